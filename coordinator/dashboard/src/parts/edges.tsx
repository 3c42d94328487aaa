// The edges of the drawn cluster, on a canvas behind its nodes.
import { useEffect, useRef, useState } from "preact/hooks";
import type { Cluster, EdgeView } from "../data/cluster.ts";
import { ink, surface, useTheme } from "./ink.ts";
import type { Aim } from "./topology.tsx";

interface Box {
  left: number;
  right: number;
  top: number;
  bottom: number;
}

const STROKES = { unknown: "muted", live: "edge", slow: "warn", silent: "warn", down: "bad" } as const;

/** `all`: every edge is drawn; else only those of what is pointed at, and those that are not live. */
export function Edges({ cluster, aim, all }: { cluster: Cluster; aim: Aim | null; all: boolean }) {
  const canvas = useRef<HTMLCanvasElement>(null);
  const [size, setSize] = useState(0);
  const theme = useTheme();
  useEffect(() => {
    const parent = canvas.current?.parentElement;
    if (!parent) return;
    const observer = new ResizeObserver(() => setSize((n) => n + 1));
    observer.observe(parent);
    return () => observer.disconnect();
  }, []);
  useEffect(() => {
    if (canvas.current) draw(canvas.current, cluster, aim, all);
  }, [cluster, cluster.t, aim, all, size, theme]);
  return <canvas ref={canvas} class="edges" aria-hidden="true" />;
}

function draw(canvas: HTMLCanvasElement, cluster: Cluster, aim: Aim | null, all: boolean): void {
  const parent = canvas.parentElement;
  if (!parent) return;
  const frame = parent.getBoundingClientRect();
  const context = surface(canvas, frame.width, frame.height);
  if (!context) return;
  const boxes = new Map<string, Box>();
  for (const node of parent.querySelectorAll<HTMLElement>("[data-node]")) {
    const box = node.getBoundingClientRect();
    boxes.set(node.dataset["node"] ?? "", { left: box.left - frame.left, right: box.right - frame.left, top: box.top - frame.top, bottom: box.bottom - frame.top });
  }
  const [first, second] = [...parent.querySelectorAll(".column")].map((column) => column.getBoundingClientRect());
  const isStacked = first !== undefined && second !== undefined && second.top >= first.bottom;
  const line = (from: string, to: string): void => {
    const [a, b] = [boxes.get(from), boxes.get(to)];
    if (a && b) (isStacked ? downwards : sideways)(context, a, b);
  };

  if (all) {
    [context.lineWidth, context.strokeStyle, context.globalAlpha] = [1, ink("line-strong"), aim ? 0.35 : 0.8];
    for (const { id } of cluster.coordinators) for (const n of cluster.attention.keys()) line(`c:${id}`, `a:${n}`);
  }
  const isAimed = (edge: EdgeView): boolean => aim !== null && edge[aim.role] === aim.n;
  const most = Math.max(1, ...[...cluster.edges.values()].map((edge) => edge.terms_per_s));
  const shown = [...cluster.edges.values()].filter((edge) => all || isAimed(edge) || (edge.state !== "live" && !aim));
  // What is unwell, then what is pointed at, comes on top.
  const height = (edge: EdgeView): number => (isAimed(edge) ? 2 : 0) + (edge.state === "live" ? 0 : 1);
  for (const edge of shown.sort((x, y) => height(x) - height(y))) {
    const isFaded = aim !== null && !isAimed(edge);
    const isLive = edge.state === "live";
    context.strokeStyle = ink(isLive && isAimed(edge) ? "accent" : STROKES[edge.state]);
    context.globalAlpha = isFaded ? 0.15 : isLive ? 0.85 : 1;
    context.lineWidth = 0.75 + 2.25 * Math.sqrt(edge.terms_per_s / most);
    context.setLineDash(edge.state === "down" ? [3, 4] : edge.state === "silent" ? [8, 4] : []);
    line(`a:${edge.a}`, `e:${edge.e}`);
  }
  context.setLineDash([]);
  context.globalAlpha = 1;
}

/** From a box to one in the next column. */
function sideways(context: CanvasRenderingContext2D, a: Box, b: Box): void {
  const [y1, y2, bend] = [(a.top + a.bottom) / 2, (b.top + b.bottom) / 2, (b.left - a.right) / 2];
  context.beginPath();
  context.moveTo(a.right, y1);
  context.bezierCurveTo(a.right + bend, y1, b.left - bend, y2, b.left, y2);
  context.stroke();
}

/** The same where the columns stand one below the other. */
function downwards(context: CanvasRenderingContext2D, a: Box, b: Box): void {
  const [x1, x2, bend] = [(a.left + a.right) / 2, (b.left + b.right) / 2, (b.top - a.bottom) / 2];
  context.beginPath();
  context.moveTo(x1, a.bottom);
  context.bezierCurveTo(x1, a.bottom + bend, x2, b.top - bend, x2, b.top);
  context.stroke();
}
