/** Images of the store, as functions of a type. */

import { createReadStream, createWriteStream } from "node:fs";
import { open, rename, rm } from "node:fs/promises";
import { pipeline } from "node:stream/promises";

import { Client } from "./client.js";
import { failure, reason } from "./failure.js";
import { systemCode } from "./locate.js";
import type { ImageDetail, ImageHandle, ImagePruneReport, PruneOptions, PullEvent } from "./models.js";
import type { On } from "./sandbox.js";

/** Bytes of an archive that are read and sent at a time. */
const CHUNK_LEN = 256 << 10;

/** The images of a service. */
export const Image = {
  /** Loads a docker or OCI archive. */
  async load(archive: string, options: { tag?: string } & On = {}): Promise<ImageHandle[]> {
    const file = await open(archive, "r").catch((error: unknown) => {
      const code = systemCode(error) === "EACCES" ? "permission_denied" : "path_not_found";
      throw failure(code, `${archive}: ${reason(error)}`, { cause: error });
    });
    await file.close();
    const client = options.client ?? (await Client.connect());
    return client.loadImage(createReadStream(archive, { highWaterMark: CHUNK_LEN }), options.tag);
  },

  /** Every image, newest first. */
  async list(on: On = {}): Promise<ImageHandle[]> {
    return (on.client ?? (await Client.connect())).images();
  },

  /** One image. */
  get(reference: string, on: On = {}): Promise<ImageHandle> {
    return Image.inspect(reference, on);
  },

  /** Everything about one image. */
  async inspect(reference: string, on: On = {}): Promise<ImageDetail> {
    return (on.client ?? (await Client.connect())).image(reference);
  },

  /** Removes an image; `force` untags it even where sandboxes use it. */
  async remove(reference: string, options: { force?: boolean } & On = {}): Promise<void> {
    await (options.client ?? (await Client.connect())).removeImage(reference, options.force);
  },

  /** Pulls an image from its registry. */
  async pull(reference: string, options: { platform?: string; progress?: (event: PullEvent) => void } & On = {}): Promise<ImageHandle> {
    for await (const event of Image.pullStream(reference, options)) {
      options.progress?.(event);
      if (event.type === "done") return event.image;
    }
    throw failure("daemon_unavailable", "the pull ended without an answer");
  },

  /** Pulls an image and tells how far each layer is; the last event has the image, a failure is thrown. */
  async *pullStream(reference: string, options: { platform?: string } & On = {}): AsyncGenerator<PullEvent, void, void> {
    yield* (options.client ?? (await Client.connect())).pullImage(reference, options.platform);
  },

  /** Writes an archive of one or several images. One that breaks off leaves no file. */
  async save(references: string | readonly string[], path: string, options: { format?: "docker" | "oci" } & On = {}): Promise<void> {
    const client = options.client ?? (await Client.connect());
    const wanted = typeof references === "string" ? [references] : references;
    const unfinished = `${path}.part`;
    try {
      await pipeline(client.saveImages(wanted, options.format), createWriteStream(unfinished));
      await rename(unfinished, path);
    } catch (error) {
      await rm(unfinished, { force: true });
      throw error;
    }
  },

  /** Removes what no sandbox, snapshot, pin or pull needs. */
  async prune(options: PruneOptions & On = {}): Promise<ImagePruneReport> {
    return (options.client ?? (await Client.connect())).pruneImages(options);
  },
};
