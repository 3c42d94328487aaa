// Arrow keys within a toolbar: one stop for Tab, however many workers there are.

/** The button that an arrow key leads to: the nearest one in that direction, measured in the picture. */
function next(from: Element, buttons: HTMLElement[], key: string): HTMLElement | undefined {
  if (key === "Home") return buttons[0];
  if (key === "End") return buttons.at(-1);
  const middle = (element: Element): [number, number] => {
    const box = element.getBoundingClientRect();
    return [box.x + box.width / 2, box.y + box.height / 2];
  };
  const [x, y] = middle(from);
  const sign = key === "ArrowRight" || key === "ArrowDown" ? 1 : -1;
  const isAcross = key === "ArrowRight" || key === "ArrowLeft";
  let best: HTMLElement | undefined;
  let least = Infinity;
  for (const button of buttons) {
    const [bx, by] = middle(button);
    const along = (isAcross ? bx - x : by - y) * sign;
    const aside = Math.abs(isAcross ? by - y : bx - x);
    if (along > 1 && along + 3 * aside < least) [best, least] = [button, along + 3 * aside];
  }
  // At the edge of the picture the order goes on.
  return best ?? buttons[buttons.indexOf(from as HTMLElement) + sign];
}

export function roving(event: KeyboardEvent): void {
  if (!["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "Home", "End"].includes(event.key)) return;
  const toolbar = event.currentTarget as HTMLElement;
  const from = (event.target as Element).closest("button");
  const buttons = [...toolbar.querySelectorAll<HTMLElement>("button")];
  const to = from && next(from, buttons, event.key);
  if (!to) return;
  event.preventDefault();
  for (const button of buttons) button.tabIndex = button === to ? 0 : -1;
  to.focus();
}
