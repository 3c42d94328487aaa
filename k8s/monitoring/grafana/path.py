"""One request's way, as far as metrics show it."""

from grafana import Dashboard, Panel, heatmap
from queries import FIRST_TOKEN, GAP, WHOLE, N, buckets, for_each, quantiles, rate, share

PATH = Dashboard(
    "moesaic-path",
    "Moesaic / One request's way",
    "From the front door to the last token: where requests wait, and where the time of a step goes.",
    [
        (
            "1 The front door",
            [
                Panel(
                    "Asked, a second",
                    [
                        (rate("moesaic_requests_total"), "let in"),
                        (rate("moesaic_requests_refused_total", by="reason"), "refused: {{reason}}"),
                    ],
                    "reqps",
                    "full: too many sequences, or a key's own limits.",
                ),
                Panel(
                    "Share refused",
                    [
                        (
                            share(
                                rate("moesaic_requests_refused_total"),
                                f"({rate('moesaic_requests_refused_total')} + {rate('moesaic_requests_total')})",
                            ),
                            "refused",
                        )
                    ],
                    "percentunit",
                ),
                Panel(
                    "Sequences at each coordinator",
                    [(f"moesaic_sequences{{{N}}}", "{{namespace}}/{{pod}}")],
                    is_stacked=True,
                ),
            ],
        ),
        (
            "2 The queue for pages",
            [
                Panel("Waiting", [(f"moesaic_sequences_waiting{{{N}}}", "{{namespace}}/{{pod}}")], is_stacked=True),
                Panel("Running", [(f"moesaic_sequences_running{{{N}}}", "{{namespace}}/{{pod}}")], is_stacked=True),
                Panel(
                    "Preemptions a second",
                    [(rate("moesaic_preemptions_total", by="namespace, pod"), "{{namespace}}/{{pod}}")],
                    about="A sequence gave its pages to others, and is prefilled again later.",
                ),
                Panel(
                    "Tokens in the cache",
                    [
                        (f"sum(moesaic_cache_pages_used{{{N}}} * moesaic_cache_page_tokens{{{N}}})", "used"),
                        (f"sum(moesaic_cache_pages{{{N}}} * moesaic_cache_page_tokens{{{N}}})", "room"),
                    ],
                    width=12,
                ),
                Panel(
                    "Orphaned",
                    [(f"moesaic_sequences_orphaned{{{N}}}", "{{namespace}}/{{pod}}")],
                    about="Their coordinator is gone; kept for another one to resume.",
                    width=12,
                ),
            ],
        ),
        (
            "3 Prefill, to the first token",
            [
                heatmap("To the first token", buckets(FIRST_TOKEN), "Pages, prefill, one step."),
                Panel("To the first token", quantiles(FIRST_TOKEN), "s"),
                Panel(
                    "First tokens later than 2.5 s",
                    [
                        (f"namespace:moesaic_first_token_late:ratio_rate5m{{{N}}}", "{{namespace}} 5 m"),
                        (f"namespace:moesaic_first_token_late:ratio_rate1h{{{N}}}", "{{namespace}} 1 h"),
                        (f"namespace:moesaic_first_token_late:ratio_rate6h{{{N}}}", "{{namespace}} 6 h"),
                    ],
                    "percentunit",
                    "The objective allows 1 of 100.",
                ),
            ],
        ),
        (
            "4 Decode, token by token",
            [
                heatmap(
                    "Between tokens", buckets(GAP), "A second hump: prefills of others, hedged frames, moved sequences."
                ),
                Panel("Between tokens", quantiles(GAP), "s"),
                Panel("The whole sequence", quantiles(WHOLE), "s"),
            ],
        ),
        (
            "5 A step of an attention worker",
            [
                Panel(
                    "Where its seconds go",
                    [(rate("moesaic_step_seconds_total", by="part"), "{{part}}")],
                    "s",
                    "Seconds of each part in a second, over all workers. wait: for experts' answers, while others run.",
                    is_stacked=True,
                ),
                Panel(
                    "Where a token's time goes",
                    [
                        (
                            for_each(
                                rate("moesaic_step_seconds_total", by="part"), rate("moesaic_micro_batch_rows_total")
                            ),
                            "{{part}}",
                        )
                    ],
                    "s",
                    "The same for each row, of prompts and of answers.",
                    is_stacked=True,
                ),
                Panel(
                    "Micro-batches a second",
                    [(rate("moesaic_micro_batches_total", by="namespace, pod"), "{{namespace}}/{{pod}}")],
                ),
                Panel(
                    "Rows in a micro-batch",
                    [
                        (
                            share(
                                rate("moesaic_micro_batch_rows_total", by="namespace, pod"),
                                rate("moesaic_micro_batches_total", by="namespace, pod"),
                            ),
                            "{{namespace}}/{{pod}}",
                        )
                    ],
                    width=12,
                    about="More rows share each read of the weights.",
                ),
                Panel(
                    "Experts that a micro-batch asks for, all layers",
                    [
                        (
                            share(
                                rate("moesaic_micro_batch_experts_total", by="namespace, pod"),
                                rate("moesaic_micro_batches_total", by="namespace, pod"),
                            ),
                            "{{namespace}}/{{pod}}",
                        )
                    ],
                    width=12,
                ),
            ],
        ),
        (
            "6 The end",
            [
                Panel(
                    "How sequences end, a second",
                    [(rate("moesaic_sequences_over_total", by="how"), "{{how}}")],
                    is_stacked=True,
                    width=12,
                ),
                Panel(
                    "Moved and resumed, a second",
                    [
                        (rate("moesaic_sequences_moved_total"), "moved to another attention worker"),
                        (rate("moesaic_sequences_resumed_total"), "resumed by clients"),
                    ],
                    width=12,
                ),
            ],
        ),
    ],
)
