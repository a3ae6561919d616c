/**
 * The TypeScript client of msb: sandboxes in microVMs, over the service's Unix socket.
 *
 * ```ts
 * await using box = await Sandbox.create("box", { image: "busybox" });
 * const output = await box.exec(["echo", "hello"]);
 * ```
 */

export * from "./errors.js";
export { MsbError } from "./failure.js";
export { API_VERSION, Client, type EventQuery, type LogQuery } from "./client.js";
export { Image } from "./image.js";
export type * from "./models.js";
export { type CollectOptions, type On, Sandbox } from "./sandbox.js";
export { type ExecEvent, ExecHandle, ExecOutput } from "./session.js";
export type { ExecOptions, SandboxOptions } from "./spec.js";
