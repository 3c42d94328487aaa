// Who holds which expert in the played cluster: greedy, the most asked-for expert first, copies on different nodes.

export class Placement {
  /** `loads`: an expert's load over its layer's mean, for each layer; `replicas`: workers that hold each. */
  constructor(layers, experts, replicas) {
    Object.assign(this, { layers, experts, replicas, epoch: 0, held: [] });
  }

  /** Places every expert; returns how many a worker has to load. */
  place(workers, loads) {
    const before = this.held;
    this.held = [];
    for (let layer = 0; layer < this.layers; layer++) {
      // Equals are taken in another order in each layer.
      const share = new Map(workers.map((worker, i) => [worker.n, ((i + 37 * layer) % workers.length) * 1e-6]));
      const order = [...Array(this.experts).keys()].sort((a, b) => loads[layer * this.experts + b] - loads[layer * this.experts + a]);
      for (const expert of order) {
        const i = layer * this.experts + expert;
        this.held[i] = [];
        this.fill(i, workers, share, loads[i]);
      }
    }
    this.epoch += 1;
    return this.held.reduce((moved, holders, i) => moved + holders.filter((n) => !before[i]?.includes(n)).length, 0);
  }

  /** Gives what some workers have to others; returns how many experts. */
  without(gone, workers, loads) {
    let moved = 0;
    for (let layer = 0; layer < this.layers; layer++) {
      const share = new Map(workers.map((worker) => [worker.n, 0]));
      for (let i = layer * this.experts; i < (layer + 1) * this.experts; i++) {
        for (const n of this.held[i]) if (share.has(n)) share.set(n, share.get(n) + loads[i] / this.replicas);
      }
      for (let i = layer * this.experts; i < (layer + 1) * this.experts; i++) {
        const left = this.held[i].filter((n) => !gone.has(n));
        if (left.length === this.held[i].length) continue;
        this.held[i] = left;
        moved += this.fill(i, workers, share, loads[i]);
      }
    }
    if (moved > 0) this.epoch += 1;
    return moved;
  }

  fill(i, workers, share, load) {
    const holders = this.held[i];
    let added = 0;
    while (holders.length < Math.min(this.replicas, workers.length)) {
      const nodes = new Set(workers.filter((worker) => holders.includes(worker.n)).map((worker) => worker.node));
      const free = workers.filter((worker) => !holders.includes(worker.n));
      const apart = free.filter((worker) => !nodes.has(worker.node));
      const least = (apart.length > 0 ? apart : free).reduce((a, b) => (share.get(b.n) < share.get(a.n) ? b : a));
      holders.push(least.n);
      share.set(least.n, share.get(least.n) + load / this.replicas);
      added += 1;
    }
    return added;
  }

  /** Each worker's experts. */
  counts() {
    const counts = new Map();
    for (const holders of this.held) for (const n of holders) counts.set(n, (counts.get(n) ?? 0) + 1);
    return counts;
  }

  /** Each worker's share of all rows: sums to 1. */
  shares(loads) {
    const shares = new Map();
    this.held.forEach((holders, i) => {
      for (const n of holders) shares.set(n, (shares.get(n) ?? 0) + loads[i] / holders.length / this.held.length);
    });
    return shares;
  }

  imbalance(workers, loads) {
    let sum = 0;
    for (let layer = 0; layer < this.layers; layer++) {
      const share = new Map();
      for (let i = layer * this.experts; i < (layer + 1) * this.experts; i++) {
        for (const n of this.held[i]) share.set(n, (share.get(n) ?? 0) + loads[i] / this.held[i].length);
      }
      sum += (Math.max(...share.values()) * workers.length) / this.experts;
    }
    return sum / this.layers;
  }

  copy() {
    const copy = Object.assign(new Placement(this.layers, this.experts, this.replicas), { epoch: this.epoch });
    copy.held = this.held.map((holders) => [...holders]);
    return copy;
  }
}
