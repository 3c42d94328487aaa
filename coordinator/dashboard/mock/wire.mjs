// Packs numbers as PROTOCOL.md says, and draws random ones that are the same in every run.

export const base64 = (bytes) => Buffer.from(bytes).toString("base64");

const clamp = (n, low, high) => Math.min(high, Math.max(low, n));

/** An expert's load over its layer's mean, as a byte. */
export const loadCode = (ratio) => (ratio <= 0 ? 0 : clamp(Math.round(128 + 16 * Math.log2(ratio)), 1, 255));
export const rateCode = (termsPerS) => Math.round(4 * Math.log2(1 + termsPerS));
export const answerCode = (us) => (us <= 0 ? 0 : Math.max(1, Math.round(8 * Math.log2(us))));

/** Unsigned LEB128. */
export function packed(numbers) {
  const bytes = [];
  for (let n of numbers) {
    for (; n >= 0x80; n = Math.floor(n / 0x80)) bytes.push((n % 0x80) | 0x80);
    bytes.push(n);
  }
  return bytes;
}

export class Random {
  constructor(seed) {
    this.state = seed >>> 0;
  }

  /** In [0, 1): mulberry32. */
  next() {
    this.state = (this.state + 0x6d2b79f5) >>> 0;
    let t = this.state;
    t = Math.imul(t ^ (t >>> 15), t | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  }

  between(low, high) {
    return low + (high - low) * this.next();
  }

  pick(list) {
    return list[Math.floor(this.next() * list.length)];
  }

  /** Around 1, its logarithm spread by sigma. */
  around(sigma) {
    return Math.exp(sigma * Math.sqrt(-2 * Math.log(1 - this.next())) * Math.cos(2 * Math.PI * this.next()));
  }

  /** How many events of a Poisson process of that mean. */
  count(mean) {
    let n = 0;
    for (let p = this.next(); p > Math.exp(-mean) && n < 1000; p *= this.next()) n++;
    return n;
  }
}
