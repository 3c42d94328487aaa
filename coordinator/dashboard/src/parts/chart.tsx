// Curves of the last 15 minutes, drawn by uPlot in the page's colours.
import { useEffect, useRef } from "preact/hooks";
import uPlot from "uplot";
import type { Cluster } from "../data/cluster.ts";
import { ink, useTheme } from "./ink.ts";
import { Panel } from "./panel.tsx";

export interface Curve {
  label: string;
  /** The column of the history. */
  column: number;
  /** A custom property of the style sheet. */
  colour: string;
  fill?: boolean;
  format: (value: number | null) => string;
}

interface ChartProps {
  title: string;
  cluster: Cluster;
  curves: Curve[];
}

const HEIGHT = 150;

export function Chart({ title, cluster, curves }: ChartProps) {
  const box = useRef<HTMLDivElement>(null);
  const plot = useRef<uPlot | null>(null);
  const theme = useTheme();
  const data = [0, ...curves.map((curve) => curve.column)].map((column) => cluster.history[column] ?? []) as uPlot.AlignedData;

  useEffect(() => {
    if (!box.current) return;
    const parent = box.current;
    const drawn = new uPlot(options(curves, parent.clientWidth), data, parent);
    plot.current = drawn;
    const observer = new ResizeObserver(() => drawn.setSize({ width: parent.clientWidth, height: HEIGHT }));
    observer.observe(parent);
    return () => {
      observer.disconnect();
      drawn.destroy();
    };
  }, [theme]);
  // A cursor that rests on the chart is left alone: what it shows moves with the data.
  useEffect(() => plot.current?.setData(data), [cluster.t, theme]);

  const now = curves.map((curve) => `${curve.label} ${curve.format(cluster.latest(curve.column))}`);
  return (
    <Panel title={title} class="chart" tools={<Legend cluster={cluster} curves={curves} />}>
      <div ref={box} role="img" aria-label={`${title}, the last 15 minutes. Now: ${now.join(", ")}`} />
    </Panel>
  );
}

function Legend({ cluster, curves }: { cluster: Cluster; curves: Curve[] }) {
  return (
    <ul class="legend" aria-hidden="true">
      {curves.map((curve) => (
        <li key={curve.label}><i class={`swatch ink-${curve.colour}`} />{curve.label} <b>{curve.format(cluster.latest(curve.column))}</b></li>
      ))}
    </ul>
  );
}

function options(curves: Curve[], width: number): uPlot.Options {
  const format = curves[0]?.format ?? String;
  const axis = { stroke: ink("muted"), font: "11px system-ui, sans-serif", grid: { stroke: ink("line"), width: 1 }, ticks: { show: false } };
  return {
    width,
    height: HEIGHT,
    legend: { show: false },
    padding: [8, 18, 0, 0],
    cursor: { y: false, points: { size: 6 }, drag: { x: false, y: false } },
    scales: { y: { range: (_plot, _min, max) => [0, max > 0 ? max * 1.12 : 1] } },
    axes: [
      { ...axis, grid: { show: false }, space: 80, size: 24, values: (_plot, times) => times.map(minute) },
      { ...axis, size: 52, space: 36, values: (_plot, values) => values.map((value) => (value === 0 ? "0" : format(value).replace(/\.0+(?!\d)/, ""))) },
    ],
    series: [
      {},
      ...curves.map((curve) => ({
        label: curve.label,
        stroke: ink(curve.colour),
        width: 1.5,
        points: { show: false },
        ...(curve.fill ? { fill: ink("wash") } : {}),
      })),
    ],
    plugins: [readout(curves)],
  };
}

const MINUTE = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit", hourCycle: "h23" });
const minute = (t: number): string => MINUTE.format(t * 1000);

/** The values under the cursor, in a small box beside it. */
function readout(curves: Curve[]): uPlot.Plugin {
  const box = document.createElement("div");
  box.className = "readout";
  return {
    hooks: {
      init: (plot) => void plot.over.append(box),
      setCursor: (plot) => {
        const { idx, left = 0 } = plot.cursor;
        const t = idx === null || idx === undefined ? undefined : plot.data[0][idx];
        box.hidden = t === undefined || left < 0;
        if (box.hidden || idx === null || idx === undefined) return;
        const values = curves.map((curve, i) => `${curve.label} ${curve.format(plot.data[i + 1]?.[idx] ?? null)}`);
        box.textContent = [new Date((t ?? 0) * 1000).toLocaleTimeString(), ...values].join("\n");
        const flip = left > plot.over.clientWidth / 2;
        box.style.left = flip ? "" : `${left + 10}px`;
        box.style.right = flip ? `${plot.over.clientWidth - left + 10}px` : "";
      },
    },
  };
}
