"""How good an SAE is: measured on a model with a frozen baseline beside it, and a report that a person reads."""
