// The experts: how much each is asked for, who holds it, how evenly that is spread; or a layer's as a table.
import { useState } from "preact/hooks";
import { byId, type Cluster } from "../data/cluster.ts";
import { holderIds, liveHolders, loadWords } from "../data/holders.ts";
import { imbalance } from "../data/imbalance.ts";
import { offBecause } from "../parts/modal.tsx";
import { HeatMap, type Measure, type Zoom } from "../parts/heatmap.tsx";
import { useTheme } from "../parts/ink.ts";
import { Choice, Panel, Scroll } from "../parts/panel.tsx";
import { css, LEGEND, ramp, themeInForce } from "../parts/ramp.ts";
import { store } from "../store.ts";

export function ExpertsView({ cluster }: { cluster: Cluster }) {
  const [form, setForm] = useState<"map" | "table">("map");
  const [measure, setMeasure] = useState<Measure>("load");
  const [zoom, setZoom] = useState<Zoom>("fit");
  const [holder, setHolder] = useState<number | null>(null);
  const { layers, experts } = cluster.model;
  const tools = (
    <>
      {form === "map" && <Choice label="Measure" value={measure} options={{ load: "Load", holders: "Holders" }} onChange={setMeasure} />}
      {form === "map" && <Choice label="Size" value={zoom} options={{ fit: "Fit", middle: "M", near: "L" }} onChange={setZoom} />}
      <Choice label="Form" value={form} options={{ map: "Map", table: "Table" }} onChange={setForm} />
    </>
  );
  return (
    <>
      <Balance cluster={cluster} />
      <Panel title="Layers × experts" note={`${layers.length} × ${experts}, of which a row chooses ${cluster.model.chosen} in each layer`} tools={tools}>
        {form === "table" ? <LayerTable cluster={cluster} /> : (
          <>
            <div class="heat-tools">
              <Legend measure={measure} />
              <label class="inline">Held by{" "}
                <select value={holder ?? ""} onChange={(event) => setHolder(event.currentTarget.value === "" ? null : Number(event.currentTarget.value))}>
                  <option value="">anybody</option>
                  {byId(cluster.experts.values()).filter((it) => !it.gone).map((it) => <option key={it.n} value={it.n}>{it.id}</option>)}
                </select>
              </label>
            </div>
            <HeatMap cluster={cluster} measure={measure} zoom={zoom} holder={holder} />
          </>
        )}
      </Panel>
    </>
  );
}

function Balance({ cluster }: { cluster: Cluster }) {
  const even = imbalance(cluster);
  const { epoch, experts_lost, experts_exposed } = cluster.status;
  const off = offBecause();
  return (
    <Panel
      title="Placement" class="balance"
      tools={<button type="button" aria-disabled={off ? "true" : undefined} aria-describedby={off ? "why-off" : undefined} onClick={() => off ?? store.show({ is: "rebalance" })}>Rebalance…</button>}
    >
      <dl class="facts-list">
        <div><dt>Epoch</dt><dd>{epoch}</dd></div>
        <div><dt>Imbalance</dt><dd>{even === null ? "–" : even.toFixed(3)}</dd></div>
        <div><dt>Without a live holder</dt><dd>{experts_lost}</dd></div>
        <div><dt>With too few</dt><dd>{experts_exposed}</dd></div>
      </dl>
      {off && <p class="muted" id="why-off">{off}</p>}
    </Panel>
  );
}

function Legend({ measure }: { measure: Measure }) {
  useTheme();
  const colours = ramp(themeInForce());
  const items: [string, string][] = measure === "load"
    ? LEGEND.map(([code, name]) => [css(colours[code] ?? [0, 0, 0]), name])
    : [["var(--bad)", "none live"], ["var(--warn)", "too few"], [css(colours[128] ?? [0, 0, 0]), "enough"], [css(colours[160] ?? [0, 0, 0]), "more"]];
  return (
    <ul class={`ramp ramp-${measure}`} aria-label={measure === "load" ? "Colours: load over the layer's mean" : "Colours: live holders"}>
      {items.map(([colour, name], i) => <li key={i}><i style={{ backgroundColor: colour }} />{name}</li>)}
    </ul>
  );
}

function LayerTable({ cluster }: { cluster: Cluster }) {
  const [row, setRow] = useState(0);
  const { layers, experts } = cluster.model;
  return (
    <>
      <label class="inline heat-tools">Layer{" "}
        <select value={row} onChange={(event) => setRow(Number(event.currentTarget.value))}>
          {layers.map((layer, i) => <option key={layer} value={i}>{layer}</option>)}
        </select>
      </label>
      <Scroll label={`Experts of layer ${layers[row]}`}>
        <table>
          <thead><tr><th scope="col">Expert</th><th scope="col" class="num">Load over the mean</th><th scope="col">Holders</th><th scope="col" class="num">Live</th></tr></thead>
          <tbody>
            {Array.from({ length: experts }, (_, expert) => {
              const i = row * experts + expert;
              return <tr key={expert}><th scope="row">{expert}</th><td class="num">{loadWords(cluster.heat[i])}</td><td>{holderIds(cluster, i).join(", ") || "–"}</td><td class="num">{liveHolders(cluster, i)}</td></tr>;
            })}
          </tbody>
        </table>
      </Scroll>
    </>
  );
}
