"""Many soft prompts on one base model, over HTTP."""
