// The page's entry: theme, link, first drawing.
import { render } from "preact";
import "uplot/dist/uPlot.min.css";
import "./styles/page.css";
import { App } from "./app.tsx";
import { currentTheme, setTheme } from "./data/settings.ts";
import { store } from "./store.ts";

setTheme(currentTheme());
const root = document.getElementById("app");
if (root) render(<App />, root);
store.link.open();
