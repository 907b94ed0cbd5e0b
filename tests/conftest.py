"""What holds for all tests."""

from hypothesis import HealthCheck, settings

# No test may depend on how fast the machine is; an example that takes long is still a good example.
settings.register_profile("vmrt", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("vmrt")
