// The few pictures of the page, drawn in the text's colour.
import type { ComponentChildren } from "preact";

function Icon({ children }: { children: ComponentChildren }) {
  return (
    <svg class="icon" viewBox="0 0 16 16" width="16" height="16" fill="none" stroke="currentColor" stroke-width="1.4" stroke-linecap="round" stroke-linejoin="round" aria-hidden="true">
      {children}
    </svg>
  );
}

export const Sun = () => <Icon><circle cx="8" cy="8" r="2.8" /><path d="M8 1.5v1.4M8 13.1v1.4M1.5 8h1.4M13.1 8h1.4M3.4 3.4l1 1M11.6 11.6l1 1M3.4 12.6l1-1M11.6 4.4l1-1" /></Icon>;
export const Moon = () => <Icon><path d="M13.2 9.6A5.6 5.6 0 0 1 6.4 2.8a5.6 5.6 0 1 0 6.8 6.8Z" /></Icon>;
export const System = () => <Icon><circle cx="8" cy="8" r="5.6" /><path d="M8 2.4v11.2A5.6 5.6 0 0 0 8 2.4Z" fill="currentColor" /></Icon>;
export const Key = () => <Icon><circle cx="5.2" cy="10.8" r="2.9" /><path d="M7.4 8.7 13.4 2.7M11.2 4.9l1.7 1.7" /></Icon>;
export const Logo = () => (
  <svg class="logo" viewBox="0 0 16 16" width="20" height="20" aria-hidden="true" fill="currentColor">
    <rect x="1" y="1" width="6.4" height="6.4" rx="1.4" /><rect x="8.6" y="1" width="6.4" height="6.4" rx="1.4" opacity=".45" />
    <rect x="1" y="8.6" width="6.4" height="6.4" rx="1.4" opacity=".7" /><rect x="8.6" y="8.6" width="6.4" height="6.4" rx="1.4" opacity=".22" />
  </svg>
);
