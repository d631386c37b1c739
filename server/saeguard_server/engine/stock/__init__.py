"""The stock Hugging Face model: loaded whole, SAEs tied to its sites and checked on it, whatever runs it later."""
