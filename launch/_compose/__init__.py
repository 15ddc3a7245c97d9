"""Command lines composed into typed settings; shared by the verbs."""
