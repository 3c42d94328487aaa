// The style sheet's colours for canvases: resolved for the theme in force, kept until it changes.
import { useEffect, useState } from "preact/hooks";

let probe: HTMLElement | null = null;
const known = new Map<string, string>();
const forget = (): void => known.clear();
window.addEventListener("themechange", forget);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", forget);

/** The colour of a custom property, such as "accent" for --accent, as the browser computes it. */
export function ink(name: string): string {
  const kept = known.get(name);
  if (kept) return kept;
  if (!probe) {
    probe = document.createElement("i");
    probe.hidden = true;
    document.body.append(probe);
  }
  probe.style.color = `var(--${name})`;
  const colour = getComputedStyle(probe).color;
  known.set(name, colour);
  return colour;
}

/** A number that changes with the theme: for effects that draw. */
export function useTheme(): number {
  const [turn, setTurn] = useState(0);
  useEffect(() => {
    const change = (): void => setTurn((n) => n + 1);
    const system = matchMedia("(prefers-color-scheme: dark)");
    window.addEventListener("themechange", change);
    system.addEventListener("change", change);
    return () => {
      window.removeEventListener("themechange", change);
      system.removeEventListener("change", change);
    };
  }, []);
  return turn;
}

/** The context of a canvas that is `width` by `height` CSS pixels, sized for the screen's density and cleared. */
export function surface(canvas: HTMLCanvasElement, width: number, height: number): CanvasRenderingContext2D | null {
  const density = window.devicePixelRatio || 1;
  const [w, h] = [Math.round(width * density), Math.round(height * density)];
  if (canvas.width !== w) canvas.width = w;
  if (canvas.height !== h) canvas.height = h;
  const context = canvas.getContext("2d");
  context?.setTransform(density, 0, 0, density, 0, 0);
  context?.clearRect(0, 0, width, height);
  return context;
}
