// The views of the page, by the name that stands in the address.

export const VIEWS = { cluster: "Cluster", experts: "Experts", requests: "Requests", events: "Events", chat: "Chat" } as const;
export type ViewName = keyof typeof VIEWS;
