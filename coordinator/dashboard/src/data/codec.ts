// How numbers are packed on the wire: logarithmic codes, base64, LEB128.

/** Bytes of a base64 text. */
export function bytes(base64: string): Uint8Array {
  return Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
}

/** An expert's load over the mean of its layer, from its byte: 0 for none, else 16 steps for each doubling, 128 for the mean. */
export function loadRatio(code: number): number {
  return code === 0 ? 0 : 2 ** ((code - 128) / 16);
}

/** Terms (rows times experts) a second from an edge's rate code: 4 steps for each doubling. */
export function rate(code: number): number {
  return 2 ** (code / 4) - 1;
}

/** Microseconds from an edge's answer code: 8 steps for each doubling; 0 for none yet. */
export function answerUs(code: number): number {
  return code === 0 ? 0 : 2 ** (code / 8);
}

/** Unsigned LEB128 numbers, one after the other. */
export function* numbers(packed: Uint8Array): Generator<number> {
  let value = 0;
  let shift = 0;
  for (const byte of packed) {
    value += (byte & 0x7f) * 2 ** shift;
    shift += 7;
    if (byte < 0x80) {
      yield value;
      value = shift = 0;
    }
  }
}

/** The holders of each expert, in the order of layers and experts. Throws unless there are exactly `experts` of them. */
export function holders(base64: string, experts: number): number[][] {
  const all: number[][] = [];
  const packed = numbers(bytes(base64));
  for (let next = packed.next(); !next.done; next = packed.next()) {
    const list = Array.from({ length: next.value }, () => {
      const holder = packed.next();
      if (holder.done) throw new Error("the placement ends in the middle of an expert");
      return holder.value;
    });
    all.push(list);
  }
  if (all.length !== experts) throw new Error(`the placement has ${all.length} experts; expected ${experts}`);
  return all;
}
