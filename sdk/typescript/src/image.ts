/** Images of the store, as functions of a type. */

import { createReadStream } from "node:fs";
import { open } from "node:fs/promises";

import { Client } from "./client.js";
import { failure, reason } from "./failure.js";
import { systemCode } from "./locate.js";
import type { ImageDetail, ImageHandle } from "./models.js";
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
};
