/** What the service answers with, as it stands in JSON. A newer service may send more fields than these. */

/** The states of a sandbox. */
export type SandboxState =
  | "created"
  | "starting"
  | "running"
  | "draining"
  | "stopping"
  | "stopped"
  | "asleep"
  | "restarting"
  | "crashed"
  | "paused";

/** What a service is. */
export interface VersionInfo {
  version: string;
  api_version: number;
  guest_generation: number;
  pid: number;
  started_at: string;
}

/** How a process ended: exactly one of `code` and `signal` is set. */
export interface ProcessEnd {
  code?: number;
  signal?: number;
  core_dumped: boolean;
  oom_killed: boolean;
  timed_out: boolean;
}

/** How a run of a sandbox ended. */
export interface RunEnd {
  boot_id: string;
  cause: string;
  process?: ProcessEnd;
  message: string;
  at: string;
}

/** One sandbox in a list. */
export interface SandboxSummary {
  name: string;
  id: string;
  status: SandboxState;
  image: string;
  command: string[];
  created_at: string;
  started_at?: string;
  last_end?: RunEnd;
  restarts: number;
  ports: string[];
  labels: Record<string, string>;
  engine?: string;
}

/** The network of one sandbox. */
export interface SandboxNetwork {
  /** Addresses of the guest and its gateway; absent: there is no network but loopback. */
  addresses?: Record<string, unknown>;
  /** The policy in the order it is tried, one line for each rule and default. */
  policy: string[];
}

/** Everything about one sandbox. */
export interface SandboxDetail extends SandboxSummary {
  spec: Record<string, unknown>;
  image_digest: string;
  boot_id?: string;
  vmm_pid?: number;
  engine_reason?: string;
  network: SandboxNetwork;
  root_allocated_bytes: number;
  directory: string;
  heartbeat_file: string;
  next_try_at?: string;
  /** What the memory that it sleeps with takes of the disk. */
  memory_allocated_bytes?: number;
  idle_for_ms?: number;
  stops_in_ms?: number;
  last_activity?: string;
}

/** A line of a sandbox's log. */
export interface LogRecord {
  time: string;
  boot_id: string;
  source: "stdout" | "stderr" | "system";
  data: string;
}

/** Something that happened to a sandbox. */
export interface EventRecord {
  sequence: number;
  time: string;
  sandbox: string;
  sandbox_id: string;
  boot_id?: string;
  event: string;
  state: SandboxState;
  cause?: string;
  actor: string;
  message?: string;
}

/** What a guest says of itself. */
export interface GuestMetrics {
  memory_used_bytes: number;
  memory_total_bytes: number;
  root_used_bytes: number;
  root_free_bytes: number;
  processes: number;
}

/** The newest sample of one sandbox. */
export interface SandboxMetrics {
  name: string;
  id: string;
  boot_id: string;
  vmm_pid: number;
  status: SandboxState;
  labels: Record<string, string>;
  restarts: number;
  started_at: string;
  last: boolean;
  sample: Record<string, unknown>;
  cpu_utilization: number;
  guest?: GuestMetrics;
}

/** The newest sample of every sandbox. */
export interface MetricsSnapshot {
  host_id: string;
  host_name: string;
  instance_id: string;
  taken_at: string;
  states: Record<string, number>;
  sandboxes: SandboxMetrics[];
}

/** One image in a list. */
export interface ImageHandle {
  digest: string;
  references: string[];
  platform: string;
  compressed_bytes: number;
  unpacked_bytes: number;
  layers: number;
  created_at?: string;
  loaded_at: string;
  pinned: boolean;
}

/** What an image says about running it. */
export interface ImageConfigDetail {
  digest: string;
  env: string[];
  entrypoint: string[];
  cmd: string[];
  working_dir: string;
  user: string;
  labels: Record<string, string>;
  stop_signal?: string;
  exposed_ports: string[];
  volumes: string[];
}

/** One layer of an image. */
export interface ImageLayerDetail {
  diff_id: string;
  blob_digest: string;
  media_type: string;
  compressed_bytes: number;
  unpacked_bytes: number;
  data_bytes: number;
  shared_by: number;
}

/** Everything about one image. */
export interface ImageDetail extends ImageHandle {
  config: ImageConfigDetail;
  layer_details: ImageLayerDetail[];
  used_by: string[];
  used_by_snapshots?: string[];
}

/** One moment of a sandbox. Counters are cumulative since the boot of their run. */
export interface HistoryPoint {
  at: string;
  boot_id: string;
  cpu_utilization: number;
  cpu_time_us: number;
  memory_resident_bytes: number;
  memory_limit_bytes: number;
  disk_read_bytes: number;
  disk_written_bytes: number;
  disk_operations: number;
  network_received_bytes: number;
  network_sent_bytes: number;
  network_packets: number;
  root_allocated_bytes: number;
  /** Absent before its first beat. */
  guest?: GuestMetrics;
}

/** The last hour of one sandbox, oldest point first. */
export interface MetricsHistory {
  name: string;
  id: string;
  points: HistoryPoint[];
}

/** A sandbox's agent has answered. */
export interface PingReport {
  boot_id: string;
  round_trip_us: number;
}

/** A page of a list; `next` is the `after` of the next one, if there is one. */
export interface SandboxPage {
  sandboxes: SandboxSummary[];
  next?: string;
}

/** How an SSH client finds a sandbox. */
export interface SshHost {
  sandbox: string;
  user: string;
  host_key: string;
  fingerprint: string;
}

/** What `ssh` needs: a block for `ssh_config`, and the host key as a line of `known_hosts`. */
export interface SshConfig {
  alias: string;
  config: string;
  known_hosts: string;
  host: SshHost;
}

/** A time of a file: seconds since 1970 and nanoseconds below a second. */
export interface FileTime {
  seconds: number;
  nanoseconds: number;
}

/** What stat(2) says of a path in a sandbox. */
export interface FileAttributes {
  mode: number;
  uid: number;
  gid: number;
  size: number;
  accessed: FileTime;
  modified: FileTime;
  changed: FileTime;
  links: number;
  device: number;
  inode: number;
  allocated: number;
}

/** One entry of a directory, with its own attributes; none if it vanished meanwhile. */
export interface DirectoryEntry {
  name: string;
  attributes?: FileAttributes;
}

/** A record of a watch; the first is `watching`. */
export type WatchRecord =
  | { type: "watching" }
  | { type: "change"; kind: "overflow" | "created" | "written" | "removed" | "attributes"; path: string; directory: boolean };

/** A sandbox that mounts a volume, where and how. */
export interface VolumeUser {
  sandbox: string;
  target: string;
  options: Record<string, boolean>;
}

/** A named volume. */
export interface VolumeDetail {
  name: string;
  kind: "dir" | "disk";
  size_bytes?: number;
  allocated_bytes: number;
  created_at: string;
  path: string;
  users: VolumeUser[];
}

/** What a prune took, or would take. */
export interface ImagePruneReport {
  dry_run: boolean;
  image_refs_removed: number;
  manifests_removed: number;
  layers_removed: number;
  fsmeta_removed: number;
  partials_removed: number;
  bytes_reclaimed: number;
  images: { digest: string; references: string[] }[];
}

/** A step of a pull. */
export type PullEvent =
  | { type: "resolved"; digest: string; platform: string; layers: { digest: string; bytes: number }[] }
  | { type: "layer"; digest: string; bytes: number }
  | { type: "layer_done"; digest: string; known: boolean }
  | { type: "retry"; what: string; reason: string; wait_ms: number }
  | { type: "warning"; message: string }
  | { type: "done"; image: ImageHandle; was_present: boolean };
