// Style sheets are bundled by the builder; importing one gives nothing.
declare module "*.css";
