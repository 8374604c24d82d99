"""The shift of the noise level by sequence length, shared by training's sampler and the preview's schedule."""

BASE_TOKENS, BASE_MU = 1024, 0.95
MAX_TOKENS, MAX_MU = 4096, 2.05


def mu_for_tokens(tokens: int) -> float:
    """mu(N) = 0.95 + 1.10 (N - 1024) / 3072, linear and not clamped (architecture sheet 6 and 7)."""
    return BASE_MU + (MAX_MU - BASE_MU) * (tokens - BASE_TOKENS) / (MAX_TOKENS - BASE_TOKENS)
