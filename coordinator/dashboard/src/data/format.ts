// Numbers and times as people read them.

/** Three significant digits, with k, M, G: 1234567 is "1.23 M". */
export function compact(n: number | null | undefined): string {
  if (n === null || n === undefined || !Number.isFinite(n)) return "–";
  const steps: [number, string][] = [[1e9, " G"], [1e6, " M"], [1e3, " k"]];
  for (const [size, unit] of steps) if (Math.abs(n) >= size * 0.9995) return digits(n / size) + unit;
  return Number.isInteger(n) ? String(n) : digits(n);
}

function digits(n: number): string {
  const size = Math.abs(n);
  return n.toFixed(size >= 99.95 ? 0 : size >= 9.995 ? 1 : 2);
}

/** A count in full, with thin spaces between thousands. */
export function count(n: number): string {
  return Math.round(n).toString().replace(/\B(?=(\d{3})+(?!\d))/g, "\u202f");
}

/** Milliseconds as "0.84 ms", "12.3 ms", "1.20 s". */
export function ms(value: number | null | undefined): string {
  if (value === null || value === undefined) return "–";
  return value >= 999.5 ? `${digits(value / 1000)} s` : `${digits(value)} ms`;
}

/** Microseconds as "840 µs", "1.20 ms". */
export function us(value: number): string {
  if (value === 0) return "–";
  return value < 999.5 ? `${Math.round(value)} µs` : ms(value / 1000);
}

/** An age as "4 s", "3 min", "2 h". */
export function age(millis: number): string {
  const s = Math.max(0, Math.floor(millis / 1000));
  if (s < 60) return `${s} s`;
  return s < 3600 ? `${Math.floor(s / 60)} min ${s % 60} s` : `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
}

const CLOCK = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" });

export const clock = (t: number): string => CLOCK.format(t);

export const percent = (part: number, whole: number): string => (whole === 0 ? "–" : `${Math.round((part / whole) * 100)} %`);

/** A list of a few, then how many more. */
export function few(items: string[], most: number): string {
  return items.length <= most ? items.join(", ") : `${items.slice(0, most).join(", ")} and ${items.length - most} more`;
}
