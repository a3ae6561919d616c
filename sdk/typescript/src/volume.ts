/** Named volumes, and what a sandbox mounts. */

import { statSync } from "node:fs";
import * as path from "node:path";

import { Client } from "./client.js";
import type { VolumeDetail } from "./models.js";
import type { On } from "./sandbox.js";
import { checkName, type Mount } from "./spec.js";

/** How something is mounted. */
export interface MountOptions {
  readOnly?: boolean;
  noExec?: boolean;
  noSuid?: boolean;
  noDev?: boolean;
}

const mount = (target: string, source: Record<string, unknown>, options: MountOptions = {}): Mount => ({
  target,
  source,
  options: {
    read_only: options.readOnly ?? false,
    no_exec: options.noExec ?? false,
    no_suid: options.noSuid ?? false,
    no_dev: options.noDev ?? false,
  },
});

/** The named volumes of a service, and mounts of every kind. */
export const Volume = {
  /** Makes a volume: a directory that sandboxes share, or a disk that one at a time has. */
  async create(name: string, options: { kind?: "dir" | "disk"; sizeMib?: number } & On = {}): Promise<VolumeDetail> {
    return (options.client ?? (await Client.connect())).createVolume(name, options);
  },

  /** One volume. */
  async get(name: string, on: On = {}): Promise<VolumeDetail> {
    return (on.client ?? (await Client.connect())).volume(name);
  },

  /** Every volume, by name. */
  async list(on: On = {}): Promise<VolumeDetail[]> {
    return (on.client ?? (await Client.connect())).volumes();
  },

  /** Removes a volume; throws `VolumeInUseError` naming the sandboxes. */
  async remove(name: string, on: On = {}): Promise<void> {
    await (on.client ?? (await Client.connect())).removeVolume(name);
  },

  /** A directory or file of this host. */
  bind(source: string, target: string, options?: MountOptions): Mount {
    const place = path.resolve(source);
    const kind = statSync(place, { throwIfNoEntry: false })?.isFile() === true ? "file" : "directory";
    return mount(target, { kind, path: place }, options);
  },

  /** A named volume, which is made if it does not exist; a disk has a size, a directory may have a quota. */
  named(
    name: string,
    target: string,
    options: { kind?: "dir" | "disk"; sizeMib?: number; quotaMib?: number } & MountOptions = {},
  ): Mount {
    const { kind, sizeMib, quotaMib } = options;
    return mount(target, { kind: "named", name: checkName(name), volume: kind, size_mib: sizeMib, quota_mib: quotaMib }, options);
  },

  /** Memory of the guest. */
  tmpfs(target: string, options: { sizeMib?: number } & MountOptions = {}): Mount {
    return mount(target, { kind: "tmpfs", size_mib: options.sizeMib }, options);
  },

  /** A disk image of this host: raw, with an ext4. */
  disk(file: string, target: string, options?: MountOptions): Mount {
    return mount(target, { kind: "disk", path: path.resolve(file) }, options);
  },
};
