// The heat map's colours: for each theme a ramp of one hue from little to much, read by a load's byte.

type Rgb = [number, number, number];

/** From a sixteenth of a layer's mean to sixteen times it. */
const STOPS: Record<"light" | "dark", Rgb[]> = {
  light: [[239, 241, 249], [203, 208, 243], [142, 150, 229], [84, 90, 201], [47, 46, 138], [24, 20, 72]],
  dark: [[27, 30, 42], [41, 46, 92], [67, 74, 165], [112, 121, 232], [172, 180, 255], [238, 240, 255]],
};
const LOWEST = 64;
const HIGHEST = 192;

export type Theme = keyof typeof STOPS;

/** Red, green, blue for each byte. */
export function ramp(theme: Theme): Rgb[] {
  const stops = STOPS[theme];
  return Array.from({ length: 256 }, (_, code) => {
    const at = (Math.min(1, Math.max(0, (code - LOWEST) / (HIGHEST - LOWEST)))) * (stops.length - 1);
    const [low, high] = [stops[Math.floor(at)] ?? stops[0], stops[Math.ceil(at)] ?? stops[0]] as [Rgb, Rgb];
    return low.map((value, i) => Math.round(value + ((high[i] ?? 0) - value) * (at % 1))) as Rgb;
  });
}

/** The bytes that the legend shows, and their names. */
export const LEGEND: [number, string][] = [[64, "1/16"], [80, ""], [96, "1/4"], [112, ""], [128, "mean"], [144, ""], [160, "4×"], [176, ""], [192, "16×"]];
export const css = (rgb: Rgb): string => `rgb(${rgb.join(" ")})`;
export const parsed = (colour: string): Rgb => (colour.match(/[\d.]+/g) ?? ["0", "0", "0"]).slice(0, 3).map(Number) as Rgb;

/** The theme that is in force, as the browser has it. */
export function themeInForce(): Theme {
  const chosen = document.documentElement.dataset["theme"];
  if (chosen === "light" || chosen === "dark") return chosen;
  return matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
}
