// The heat map of layers x experts. One canvas as large as what is seen of it: a small picture, a pixel for each expert, is enlarged
// and shifted as one scrolls, so that 14,848 cells cost as little as a few.
import { useCallback, useEffect, useRef, useState } from "preact/hooks";
import type { Cluster } from "../data/cluster.ts";
import { holderWords, liveHolders } from "../data/holders.ts";
import { ink, surface, useTheme } from "./ink.ts";
import { parsed, ramp, themeInForce } from "./ramp.ts";

export type Measure = "load" | "holders";
export type Zoom = "fit" | "middle" | "near";

interface Props {
  cluster: Cluster;
  measure: Measure;
  zoom: Zoom;
  /** Only what this worker holds stands out; null for all. */
  holder: number | null;
}

interface Cells {
  width: number;
  height: number;
}

/** Room for the layers' numbers, and for the experts'. */
const LEFT = 34;
const TOP = 20;
/** Room for a scroll bar below. */
const SCROLLBAR = 12;
/** Cells from this size on stand apart. */
const GAP_FROM = 7;

export function HeatMap({ cluster, measure, zoom, holder }: Props) {
  const scroller = useRef<HTMLDivElement>(null);
  const canvas = useRef<HTMLCanvasElement>(null);
  const [room, setRoom] = useState(0);
  const [at, setAt] = useState<number | null>(null);
  const theme = useTheme();
  const { layers, experts } = cluster.model;
  const cells = sized(zoom, room, layers.length, experts);

  const full = { width: LEFT + experts * cells.width, height: TOP + layers.length * cells.height };
  const bar = full.width > room ? SCROLLBAR : 0;

  const picture = useRef<HTMLCanvasElement | null>(null);
  const painted = useRef<unknown[]>([]);
  const paint = useCallback((): void => {
    if (!canvas.current || !scroller.current) return;
    const inputs = [cluster.heat, cluster.holders, cluster.status.experts_exposed, measure, holder, theme, themeInForce()];
    if (inputs.some((input, i) => input !== painted.current[i])) {
      picture.current = pictured(cluster, measure, holder);
      painted.current = inputs;
    }
    if (picture.current) draw(canvas.current, scroller.current, picture.current, layers, experts, cells, at);
  }, [cluster, measure, holder, theme, cells.width, cells.height, at]);

  useEffect(() => {
    const element = scroller.current;
    if (!element) return;
    const observer = new ResizeObserver(() => setRoom(element.clientWidth));
    observer.observe(element);
    return () => observer.disconnect();
  }, []);
  useEffect(paint);
  const frame = useRef(0);
  const scrolled = (): void => {
    cancelAnimationFrame(frame.current);
    frame.current = requestAnimationFrame(paint);
  };

  const pointed = (event: PointerEvent): void => {
    const box = scroller.current?.getBoundingClientRect();
    if (!box || !scroller.current) return;
    const [x, y] = [event.clientX - box.left - LEFT, event.clientY - box.top - TOP];
    const column = Math.floor((x + scroller.current.scrollLeft) / cells.width);
    const row = Math.floor((y + scroller.current.scrollTop) / cells.height);
    const isInside = x >= 0 && y >= 0 && column < experts && row < layers.length;
    setAt(isInside ? row * experts + column : null);
  };
  const moved = (event: KeyboardEvent): void => {
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -experts, ArrowDown: experts }[event.key];
    if (step === undefined || !scroller.current) return;
    event.preventDefault();
    const next = at === null ? 0 : at + step;
    if (next < 0 || next >= layers.length * experts) return;
    setAt(next);
    reveal(scroller.current, cells, next, experts);
  };

  return (
    <>
      <div
        ref={scroller} class="heat" style={{ height: `${full.height + bar}px` }} role="application" tabIndex={0} aria-label="Heat map of layers and experts: arrow keys move from expert to expert"
        aria-describedby="heat-readout" onScroll={scrolled} onPointerMove={pointed} onPointerLeave={() => setAt(null)} onKeyDown={moved}
      >
        <canvas ref={canvas} />
        <div class="heat-space" style={{ width: `${full.width}px`, height: `${full.height}px` }} />
      </div>
      <p class="caption" id="heat-readout" role="status">{at === null ? "Point at an expert, or move with the arrow keys." : words(cluster, at)}</p>
    </>
  );
}

function words(cluster: Cluster, at: number): string {
  const { layers, experts } = cluster.model;
  return `Layer ${layers[Math.floor(at / experts)]}, expert ${at % experts}: ${holderWords(cluster, at)}`;
}

function sized(zoom: Zoom, room: number, layers: number, experts: number): Cells {
  if (zoom === "near") return { width: 22, height: 20 };
  if (zoom === "middle") return { width: 12, height: 12 };
  const width = Math.min(44, Math.max(4, Math.floor((room - LEFT) / experts)));
  return { width, height: Math.min(30, Math.max(8, Math.min(Math.floor(460 / layers), width * 2))) };
}

/** A pixel for each expert. */
function pictured(cluster: Cluster, measure: Measure, holder: number | null): HTMLCanvasElement | null {
  const { layers, experts } = cluster.model;
  const source = measure === "load" ? cluster.heat : cluster.holders;
  if (source.length !== layers.length * experts) return null;
  const picture = document.createElement("canvas");
  [picture.width, picture.height] = [experts, layers.length];
  const context = picture.getContext("2d");
  if (!context) return null;
  const image = context.createImageData(experts, layers.length);
  const colours = ramp(themeInForce());
  const [bad, warn] = [parsed(ink("bad")), parsed(ink("warn"))];
  const held = (count: number) => (count === 0 ? bad : count < cluster.model.replicas ? warn : colours[Math.min(192, 96 + count * 16)]);
  for (let i = 0; i < source.length; i++) {
    const rgb = (measure === "load" ? colours[cluster.heat[i] ?? 0] : held(liveHolders(cluster, i))) ?? [0, 0, 0];
    const isFaded = holder !== null && !cluster.holders[i]?.includes(holder);
    image.data.set([...rgb, isFaded ? 40 : 255], i * 4);
  }
  context.putImageData(image, 0, 0);
  return picture;
}

function draw(canvas: HTMLCanvasElement, scroller: HTMLElement, picture: HTMLCanvasElement, layers: number[], experts: number, cells: Cells, at: number | null): void {
  const [width, height] = [scroller.clientWidth, scroller.clientHeight];
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const context = surface(canvas, width, height);
  if (!context) return;
  const [left, top] = [LEFT - scroller.scrollLeft, TOP - scroller.scrollTop];
  const first = { column: Math.max(0, Math.floor(scroller.scrollLeft / cells.width)), row: Math.max(0, Math.floor(scroller.scrollTop / cells.height)) };
  const last = { column: Math.min(experts, first.column + Math.ceil(width / cells.width) + 1), row: Math.min(layers.length, first.row + Math.ceil(height / cells.height) + 1) };
  const [columns, rows] = [last.column - first.column, last.row - first.row];
  const [x, y] = [left + first.column * cells.width, top + first.row * cells.height];
  context.imageSmoothingEnabled = false;
  context.save();
  context.beginPath();
  context.rect(LEFT, TOP, width, height);
  context.clip();
  context.drawImage(picture, first.column, first.row, columns, rows, x, y, columns * cells.width, rows * cells.height);
  context.fillStyle = ink("panel");
  if (cells.width >= GAP_FROM) for (let i = 1; i <= columns; i++) context.fillRect(x + i * cells.width - 1, y, 1, rows * cells.height);
  if (cells.height >= GAP_FROM) for (let i = 1; i <= rows; i++) context.fillRect(x, y + i * cells.height - 1, columns * cells.width, 1);
  if (at !== null) {
    [context.strokeStyle, context.lineWidth] = [ink("text"), 2];
    context.strokeRect(left + (at % experts) * cells.width - 1, top + Math.floor(at / experts) * cells.height - 1, cells.width + 1, cells.height + 1);
  }
  context.restore();
  labels(context, layers, first, last, cells, left, top);
}

/** The layers' numbers at the left and the experts' at the top, as many as there is room for. */
function labels(context: CanvasRenderingContext2D, layers: number[], first: { column: number; row: number }, last: { column: number; row: number }, cells: Cells, left: number, top: number): void {
  context.font = "11px system-ui, sans-serif";
  context.fillStyle = ink("muted");
  context.textBaseline = "middle";
  context.textAlign = "right";
  const every = (size: number, room: number): number => [1, 2, 4, 8, 16, 32, 64].find((n) => n * size >= room) ?? 128;
  const [rowStep, columnStep] = [every(cells.height, 14), every(cells.width, 28)];
  for (let row = first.row; row < last.row; row++) {
    const y = top + (row + 0.5) * cells.height;
    if (row % rowStep === 0 && y > TOP) context.fillText(String(layers[row]), LEFT - 8, y);
  }
  context.textAlign = "center";
  for (let column = first.column; column < last.column; column++) {
    const x = left + (column + 0.5) * cells.width;
    if (column % columnStep === 0 && x > LEFT) context.fillText(String(column), Math.max(x, LEFT + 4), TOP / 2);
  }
}

/** Scrolls as little as needed to see a cell. */
function reveal(scroller: HTMLElement, cells: Cells, at: number, experts: number): void {
  const [x, y] = [(at % experts) * cells.width, Math.floor(at / experts) * cells.height];
  const [width, height] = [scroller.clientWidth - LEFT, scroller.clientHeight - TOP];
  scroller.scrollLeft = Math.min(x, Math.max(scroller.scrollLeft, x + cells.width - width));
  scroller.scrollTop = Math.min(y, Math.max(scroller.scrollTop, y + cells.height - height));
}
