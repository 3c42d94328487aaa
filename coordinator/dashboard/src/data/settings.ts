// What this browser keeps: the key for as long as the tab lives, the theme for good. Works without, where storage is off.

function kept(storage: () => Storage, name: string) {
  let value = "";
  try {
    value = storage().getItem(name) ?? "";
  } catch {
    // Storage is off: kept until the page is left.
  }
  return {
    get: (): string => value,
    set(next: string): void {
      value = next;
      try {
        if (next) storage().setItem(name, next);
        else storage().removeItem(name);
      } catch {
        // As above.
      }
    },
  };
}

export const key = kept(() => sessionStorage, "moesaic.key");

export type Theme = "" | "light" | "dark";
const theme = kept(() => localStorage, "moesaic.theme");

export function currentTheme(): Theme {
  const value = theme.get();
  return value === "light" || value === "dark" ? value : "";
}

/** Empty: as the system has it. */
export function setTheme(next: Theme): void {
  theme.set(next);
  if (next) document.documentElement.dataset["theme"] = next;
  else delete document.documentElement.dataset["theme"];
  window.dispatchEvent(new Event("themechange"));
}
