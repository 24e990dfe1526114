"""What the numbers on a command line may be."""


def at_least(**limits: tuple[int | None, int]) -> None:
    """ValueError for the first option whose (value, least) does not fit; one that is not given is None."""
    for name, (value, least) in limits.items():
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
