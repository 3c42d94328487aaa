"""PromQL that many panels have in common. $namespace: the clusters that were picked."""

# In every selector.
N = 'namespace=~"$namespace"'
FIRST_TOKEN = "moesaic_time_to_first_token_seconds"
GAP = "moesaic_time_between_tokens_seconds"
WHOLE = "moesaic_sequence_seconds"


def rate(metric: str, labels: str = "", by: str = "") -> str:
    """Of a counter, a second, over all pods or by labels."""
    selector = f"{N},{labels}" if labels else N
    grouped = f"sum by ({by})" if by else "sum"
    return f"{grouped} (rate({metric}{{{selector}}}[$__rate_interval]))"


def share(part: str, whole: str) -> str:
    """Of a rate in another; nothing where there is none."""
    return f"{part} / ({whole} > 0)"


def for_each(parts: str, whole: str) -> str:
    """Rates that have labels, in one that has none."""
    return f"{parts} / on () group_left () ({whole} > 0)"


def quantiles(metric: str) -> list[tuple[str, str]]:
    """The usual quantiles of a histogram, over all pods."""
    buckets = rate(f"{metric}_bucket", by="le")
    return [(f"histogram_quantile({q}, {buckets})", f"p{q * 100:g}") for q in (0.5, 0.9, 0.99)]


def buckets(metric: str) -> str:
    """What came into each bucket of a histogram, over all pods."""
    return f"sum by (le) (increase({metric}_bucket{{{N}}}[$__rate_interval]))"
