"""Whether a cluster serves, how much and how fast."""

from grafana import WRONG_ABOVE_ZERO, WRONG_AT_ZERO, Dashboard, Panel, stat
from queries import FIRST_TOKEN, GAP, N, quantiles, rate

OVERVIEW = Dashboard(
    "moesaic-overview",
    "Moesaic / Overview",
    "Whether a cluster serves, how much and how fast. Begin here.",
    [
        (
            "Now",
            [
                stat(
                    "Alerts that fire",
                    f'count(ALERTS{{{N},alertname=~"Moesaic.*",alertstate="firing"}}) or vector(0)',
                    WRONG_ABOVE_ZERO,
                ),
                stat("Coordinators that are ready", f"sum(moesaic_ready{{{N}}})", WRONG_AT_ZERO),
                stat(
                    "Experts lost",
                    f"max(moesaic_experts_lost{{{N}}})",
                    WRONG_ABOVE_ZERO,
                    about="By the newest placement, also while it is loaded and the one before it serves.",
                ),
                stat(
                    "Experts with too few copies",
                    f"max(moesaic_experts_exposed{{{N}}})",
                    [("green", None), ("orange", 1)],
                ),
                stat(
                    "Registry in reach",
                    f"min(moesaic_registry_reachable{{{N}}})",
                    WRONG_AT_ZERO,
                    about="0: the last view stays in force; nothing can start or be placed.",
                ),
                stat("Leaders", f"sum(moesaic_leader{{{N}}})", WRONG_AT_ZERO, about="One a cluster."),
            ],
        ),
        (
            "What clients see",
            [
                Panel(
                    "Tokens a second",
                    [
                        (rate("moesaic_generated_tokens_total"), "generated"),
                        (rate("moesaic_prompt_tokens_total"), "of prompts"),
                    ],
                ),
                Panel(
                    "To the first token",
                    quantiles(FIRST_TOKEN),
                    "s",
                    "From the call of an attention worker: the wait for pages and the prefill.",
                ),
                Panel("Between tokens", quantiles(GAP), "s"),
                Panel(
                    "Requests a second",
                    [
                        (rate("moesaic_requests_total"), "let in"),
                        (rate("moesaic_requests_refused_total", by="reason"), "refused: {{reason}}"),
                    ],
                    "reqps",
                ),
                Panel(
                    "Sequences",
                    [
                        (f"sum(moesaic_sequences{{{N}}})", "at coordinators"),
                        (f"sum(moesaic_sequences_running{{{N}}})", "running"),
                        (f"sum(moesaic_sequences_waiting{{{N}}})", "waiting for pages"),
                    ],
                ),
                Panel(
                    "Sequences that end, a second",
                    [(rate("moesaic_sequences_over_total", by="how"), "{{how}}")],
                    about="failed: with an error. left: the client has gone.",
                ),
            ],
        ),
        (
            "What carries it",
            [
                Panel(
                    "Latent cache",
                    [(f"moesaic_cache_pages_used{{{N}}} / moesaic_cache_pages{{{N}}}", "{{namespace}}/{{pod}}")],
                    "percentunit",
                    "Full: sequences wait, or give up their pages and start again.",
                ),
                Panel(
                    "Busy expert workers",
                    [(rate("moesaic_busy_seconds_total", by="namespace, pod"), "{{namespace}}/{{pod}}")],
                    "percentunit",
                ),
                Panel(
                    "Busiest expert worker over the mean",
                    [(f"namespace:moesaic_expert_terms:max_over_mean_rate10m{{{N}}}", "{{namespace}}")],
                ),
                Panel(
                    "Nodes that are registered",
                    [(f"namespace_component:moesaic_members:max{{{N}}}", "{{namespace}} {{component}}")],
                ),
                Panel(
                    "Nodes that answer Prometheus",
                    [(f'sum by (namespace, component) (up{{{N},component!=""}})', "{{namespace}} {{component}}")],
                    about="More than are registered: some start, stop or are cut off from etcd.",
                ),
                Panel(
                    "Lost, moved, resumed",
                    [
                        (rate("moesaic_sequences_moved_total"), "moved to another attention worker"),
                        (rate("moesaic_sequences_resumed_total"), "resumed by clients"),
                    ],
                    about="Sequences a second that outlived a node.",
                ),
                Panel(
                    "Placements",
                    [(f'max by (namespace) (moesaic_placement_epoch{{{N},component="coordinator"}})', "{{namespace}}")],
                    about="The epoch of the one in force.",
                ),
                Panel(
                    "Leader's term",
                    [(f"max by (namespace) (moesaic_leader_term{{{N}}})", "{{namespace}}")],
                    about="Each step is a new leader.",
                ),
                Panel(
                    "Cordoned, silent",
                    [
                        (f"max by (namespace) (moesaic_workers_cordoned{{{N}}})", "{{namespace}} cordoned"),
                        (
                            f"max by (namespace) (moesaic_attention_workers_silent{{{N}}})",
                            "{{namespace}} attention workers silent",
                        ),
                    ],
                ),
                Panel(
                    "Versions",
                    [(f"count by (namespace, component, version) (moesaic_build_info{{{N}}})", "")],
                    kind="table",
                    about="More than one of a role: an upgrade is under way.",
                ),
            ],
        ),
    ],
)
