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
export { API_VERSION, Client, type EventQuery, type ListQuery, type LogQuery, type MetricsQuery } from "./client.js";
export type { CopyReport } from "./copy.js";
export { Fs, isDirectory, isFile, isSymlink } from "./fs.js";
export { Image } from "./image.js";
export type * from "./models.js";
export { type CollectOptions, type On, Sandbox } from "./sandbox.js";
export { type ExecEvent, ExecHandle, ExecOutput } from "./session.js";
export type { ExecOptions, Mount, Network, NetworkProfile, Rootfs, SandboxOptions } from "./spec.js";
export { type MountOptions, Volume } from "./volume.js";
