"""What the tests ask the demo model."""

MODEL = "SmolLM2-135M-Instruct"
FRANCE = "What is the capital of France?"
PARIS = "The capital of France is Paris."
CONVERSATIONS = [
    ("", [("Hi", "Hello!")], "Tell me about the sea."),
    ("You are a pirate.\n", [("1 + 1?", "2"), ("", "?")], " Who are you?\n"),
]
"""System prompt, history and question: every way to the model answers them alike."""
