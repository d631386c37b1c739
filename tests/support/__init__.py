"""What several tests share: small models, SAEs with random weights, and references that are not our code."""
