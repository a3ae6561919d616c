/** Images of the store, as functions of a type. */

import { createReadStream, realpathSync } from "node:fs";
import { open } from "node:fs/promises";

import { Client } from "./client.js";
import { failure } from "./failure.js";
import { localError, writeWhole } from "./fs.js";
import type { ImageDetail, ImageHandle, ImagePruneReport, PullEvent } from "./models.js";
import type { On } from "./sandbox.js";
import type { Rootfs } from "./spec.js";

/** Bytes of an archive that are read and sent at a time. */
const CHUNK_LEN = 256 << 10;

/** The images of a service. */
export const Image = {
  /** A directory of this host as root, for `Sandbox.create`; the sandbox changes nothing of it. */
  bind(directory: string): Rootfs {
    return { kind: "directory", path: realpathSync(directory) };
  },

  /** A raw disk of this host with an ext4 or EROFS file system as root, for `Sandbox.create`; the sandbox changes nothing of it. */
  disk(file: string): Rootfs {
    return { kind: "disk", path: realpathSync(file) };
  },

  /** Fetches an image from its registry; `progress` hears each step. A pull that fails is taken up by the next one. */
  async pull(
    reference: string,
    options: {
      platform?: string;
      credentials?: { username: string; password: string };
      insecure?: boolean;
      progress?: (event: PullEvent) => void;
    } & On = {},
  ): Promise<ImageHandle> {
    const { platform, credentials, insecure, progress } = options;
    const client = options.client ?? (await Client.connect());
    for await (const event of client.pullImage({ reference, platform, credentials, insecure })) {
      progress?.(event);
      if (event.type === "done") return event.image;
    }
    throw failure("daemon_unavailable", "the pull ended without an answer");
  },

  /** Saves images as one archive. The file is there whole or not at all. */
  async save(references: string | readonly string[], file: string, options: { format?: "docker" | "oci" } & On = {}): Promise<void> {
    const client = options.client ?? (await Client.connect());
    await writeWhole(client.saveImages(typeof references === "string" ? [references] : references, options.format), file);
  },

  /** Gives an image another name. */
  async tag(reference: string, name: string, on: On = {}): Promise<ImageHandle> {
    return (on.client ?? (await Client.connect())).tagImage(reference, name);
  },

  /** Removes the images that this allows and nothing needs; `all` takes pinned ones too. */
  async prune(
    options: { all?: boolean; dryRun?: boolean; olderThanMs?: number; keepBytes?: number; labels?: readonly string[] } & On = {},
  ): Promise<ImagePruneReport> {
    const { all, dryRun, olderThanMs, keepBytes, labels } = options;
    const request = { all, dry_run: dryRun, older_than_ms: olderThanMs, keep_bytes: keepBytes, labels };
    return (options.client ?? (await Client.connect())).pruneImages(request);
  },

  /** Loads a docker or OCI archive. */
  async load(archive: string, options: { tag?: string } & On = {}): Promise<ImageHandle[]> {
    const file = await open(archive, "r").catch((error: unknown) => {
      throw localError(archive, error);
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
};
