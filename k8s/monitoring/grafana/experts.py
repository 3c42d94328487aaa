"""Who holds the experts, and who has how much of the work."""

from grafana import Dashboard, Panel
from queries import N, rate, share

EXPERTS = Dashboard(
    "moesaic-experts",
    "Moesaic / Experts",
    "Who holds the experts, who has how much of the work, and whether the placement spreads it.",
    [
        (
            "The placement",
            [
                Panel(
                    "Lost and exposed",
                    [
                        (f"max by (namespace) (moesaic_experts_lost{{{N}}})", "{{namespace}} lost"),
                        (f"max by (namespace) (moesaic_experts_exposed{{{N}}})", "{{namespace}} with too few copies"),
                    ],
                    about="By the newest placement, also while it is being loaded.",
                ),
                Panel(
                    "Epoch that each expert worker has loaded",
                    [
                        (f'moesaic_placement_epoch{{{N},component="expert-worker"}}', "{{namespace}}/{{pod}}"),
                        (
                            f'max by (namespace) (moesaic_placement_epoch{{{N},component="coordinator"}})',
                            "{{namespace}} in force",
                        ),
                    ],
                ),
                Panel(
                    "Placements and moved experts, an hour",
                    [
                        (
                            f"sum by (namespace) (increase(moesaic_placements_total{{{N}}}[1h]))",
                            "{{namespace}} placements",
                        ),
                        (
                            f"sum by (namespace) (increase(moesaic_experts_moved_total{{{N}}}[1h]))",
                            "{{namespace}} experts loaded for them",
                        ),
                    ],
                ),
                Panel("Experts held", [(f"moesaic_experts{{{N}}}", "{{namespace}}/{{pod}}")], width=12),
                Panel(
                    "Bytes of experts", [(f"moesaic_experts_bytes{{{N}}}", "{{namespace}}/{{pod}}")], "bytes", width=12
                ),
            ],
        ),
        (
            "Balance",
            [
                Panel(
                    "Busiest over the mean, as planned",
                    [
                        (
                            f"max by (namespace, when) (moesaic_placement_imbalance{{{N}}} and on (namespace, pod) moesaic_leader == 1)",
                            "{{namespace}} {{when}}",
                        )
                    ],
                    about="before: the placement in force then. after: the one that was planned last.",
                ),
                Panel(
                    "Busiest over the mean, as measured",
                    [(f"namespace:moesaic_expert_terms:max_over_mean_rate10m{{{N}}}", "{{namespace}}")],
                ),
                Panel(
                    "Hottest expert of a layer over its mean",
                    [
                        (
                            f"max by (namespace, layer) (moesaic_expert_rows_max_over_mean{{{N}}})",
                            "{{namespace}} layer {{layer}}",
                        )
                    ],
                    about="How unevenly the gate chooses, since the attention workers started.",
                ),
                Panel(
                    "Experts that are chosen most",
                    [(f"topk(20, sum by (namespace, layer, expert) (moesaic_expert_rows_total{{{N}}}))", "")],
                    kind="table",
                    about="Rows since the attention workers started.",
                    width=24,
                ),
            ],
        ),
        (
            "The work",
            [
                Panel(
                    "Rows times experts, a second",
                    [(rate("moesaic_expert_terms_total", by="namespace, pod"), "{{namespace}}/{{pod}}")],
                ),
                Panel(
                    "Busy",
                    [(rate("moesaic_busy_seconds_total", by="namespace, pod"), "{{namespace}}/{{pod}}")],
                    "percentunit",
                ),
                Panel(
                    "Time for a row of an expert",
                    [
                        (
                            share(
                                rate("moesaic_busy_seconds_total", by="namespace, pod"),
                                rate("moesaic_expert_terms_total", by="namespace, pod"),
                            ),
                            "{{namespace}}/{{pod}}",
                        )
                    ],
                    "s",
                    "One that is higher than the others': a slow machine, or few rows for each read of the weights.",
                ),
                Panel("Frames that wait", [(f"moesaic_inbox_frames{{{N}}}", "{{namespace}}/{{pod}}")], width=12),
                Panel(
                    "Frames refused, a second",
                    [(rate("moesaic_frames_refused_total", by="namespace, reason"), "{{namespace}} {{reason}}")],
                    width=12,
                    about="epoch and not_held pass while placements change. busy: too much work. malformed: should never be.",
                ),
            ],
        ),
    ],
)
