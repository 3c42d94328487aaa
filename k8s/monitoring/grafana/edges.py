"""The ways from attention workers to expert workers."""

from grafana import Dashboard, Panel
from queries import N, rate, share

EDGES = Dashboard(
    "moesaic-edges",
    "Moesaic / Edges",
    "The ways from attention workers to expert workers: which are slow, silent or down, and what is sent twice for it.",
    [
        (
            "States",
            [
                Panel(
                    "Edges by state",
                    [(f"sum by (namespace, state) (moesaic_edge_state{{{N}}})", "{{namespace}} {{state}}")],
                    is_stacked=True,
                ),
                Panel(
                    "Expert workers that are slow, silent or down",
                    [
                        (
                            f'sum by (namespace, worker, state) (moesaic_edge_state{{{N},state!="live"}}) > 0',
                            "{{namespace}}/{{worker}} {{state}}",
                        )
                    ],
                    about="By how many attention workers see it so. All of them: the worker. One of them: the network, or that one.",
                ),
                Panel(
                    "Attention workers that reach every expert",
                    [
                        (f"sum by (namespace) (moesaic_experts_reachable{{{N}}})", "{{namespace}}"),
                        (f"count by (namespace) (moesaic_experts_reachable{{{N}}})", "{{namespace}} of"),
                    ],
                ),
                Panel(
                    "Edges that are not live",
                    [(f'moesaic_edge_state{{{N},state!="live"}} == 1', "")],
                    kind="table",
                    width=24,
                ),
            ],
        ),
        (
            "Speed",
            [
                Panel(
                    "A frame's answer, by expert worker",
                    [(f"avg by (namespace, worker) (moesaic_edge_answer_seconds{{{N}}})", "{{namespace}}/{{worker}}")],
                    "s",
                    "Smoothed, the mean over attention workers.",
                ),
                Panel(
                    "A frame's answer, by attention worker",
                    [(f"avg by (namespace, pod) (moesaic_edge_answer_seconds{{{N}}})", "{{namespace}}/{{pod}}")],
                    "s",
                ),
                Panel(
                    "Rows times experts answered, a second",
                    [(rate("moesaic_edge_terms_total", by="namespace, worker"), "{{namespace}}/{{worker}}")],
                ),
                Panel(
                    "Bytes of frames, a second",
                    [(rate("moesaic_edge_bytes_total", by="namespace, direction"), "{{namespace}} {{direction}}")],
                    "Bps",
                ),
                Panel(
                    "Edges by what they travel by",
                    [
                        (
                            f"sum by (namespace, transport) (moesaic_edge_transport{{{N}}})",
                            "{{namespace}} {{transport}}",
                        )
                    ],
                    about="Where GPUs have NCCL, edges should be by nccl; grpc means that a lane has failed or cannot be.",
                ),
                Panel(
                    "Lanes that failed, a second",
                    [(rate("moesaic_lane_failures_total", by="namespace, worker"), "{{namespace}}/{{worker}}")],
                ),
                Panel(
                    "Frames that wait for answers",
                    [(f"moesaic_frames_outstanding{{{N}}}", "{{namespace}}/{{pod}}")],
                    width=12,
                ),
                Panel(
                    "Epoch that rows are sent under",
                    [(f'moesaic_placement_epoch{{{N},component="attention-worker"}}', "{{namespace}}/{{pod}}")],
                    width=12,
                ),
            ],
        ),
        (
            "Sent twice, dropped",
            [
                Panel(
                    "Frames sent, a second",
                    [
                        (rate("moesaic_frames_sent_total", by="namespace, pod"), "{{namespace}}/{{pod}}"),
                        (rate("moesaic_frames_ahead_total", by="namespace, pod"), "{{namespace}}/{{pod}}, ahead"),
                    ],
                    about="Ahead: over lanes, before it was known which experts were chosen.",
                ),
                Panel(
                    "Share sent again or twice",
                    [
                        (
                            share(rate("moesaic_frames_resent_total"), rate("moesaic_frames_sent_total")),
                            "again, after a loss",
                        ),
                        (
                            share(rate("moesaic_frames_hedged_total"), rate("moesaic_frames_sent_total")),
                            "twice, for lateness",
                        ),
                    ],
                    "percentunit",
                ),
                Panel(
                    "Share of the work done twice",
                    [(share(rate("moesaic_terms_hedged_total"), rate("moesaic_terms_total")), "rows times experts")],
                    "percentunit",
                    "At most 4 of 100 for lateness.",
                ),
                Panel(
                    "Answers dropped, a second",
                    [(rate("moesaic_answers_dropped_total", by="namespace, why"), "{{namespace}} {{why}}")],
                    about="unmatched: late or second answers, harmless. misdirected, rejected: should never be.",
                    width=24,
                ),
            ],
        ),
    ],
)
