"""pytest with coverage: `python -m tests.support.covered ARGS`.

Coverage looks at each line that runs, also in packages it does not measure. So the large ones are imported before.
"""

import sys

import gradio  # noqa: F401
import pytest
import vllm.entrypoints.openai.api_server  # noqa: F401
from coverage import Coverage

coverage = Coverage()
with coverage.collect():
    status = pytest.main()
coverage.save()
sys.exit(status)
