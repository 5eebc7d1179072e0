#!/usr/bin/env bash
# setproctitle 1.3.8 (vLLM names its processes by it): once the environment that a process began with is gone from its
# `os.environ`, the first call changes nothing, and says nothing. It looks for the arguments in front of the first
# variable. A child that replaces its environment by another (a fork server's, say) so keeps its parent's name. What
# one would have guessed: the name is set, or an error. A call before the change, of any of its functions, mends it.
#
# Seen on 2026-11-28, Linux, Python 3.11:
#   as it began: renamed
#   a variable added: renamed
#   emptied first: python
#   emptied after a first call: renamed
#
# Exits with 0 while that is so, else with 1.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check setproctitle==1.3.8
cat >"$folder/names.py" <<'PYTHON'
import os
import subprocess
import sys

NAME = "import setproctitle; setproctitle.setproctitle('renamed'); print(open('/proc/self/comm').read().strip())"
CASES = {
    "as it began": "",
    "a variable added": "os.environ['ADDED'] = '1';",
    "emptied first": "os.environ.clear();",
    "emptied after a first call": "import setproctitle; setproctitle.getproctitle(); os.environ.clear();",
}
seen = {}
for case, before in CASES.items():
    run = subprocess.run([sys.executable, "-c", f"import os; {before} {NAME}"], capture_output=True, text=True, check=True)
    seen[case] = run.stdout.strip()
    print(f"{case}: {seen[case]}")
assert seen.pop("emptied first").startswith("python"), "it sets the name now"
assert set(seen.values()) == {"renamed"}, seen
PYTHON
"$folder/venv/bin/python" "$folder/names.py"
