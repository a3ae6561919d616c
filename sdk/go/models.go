package msb

import (
	"encoding/json"
	"time"
)

// VersionInfo is what a service is.
type VersionInfo struct {
	Version         string    `json:"version"`
	APIVersion      int       `json:"api_version"`
	GuestGeneration int       `json:"guest_generation"`
	PID             int       `json:"pid"`
	StartedAt       time.Time `json:"started_at"`
}

// ProcessEnd is how a process ended: exactly one of Code and Signal is set.
type ProcessEnd struct {
	Code       *int `json:"code"`
	Signal     *int `json:"signal"`
	CoreDumped bool `json:"core_dumped"`
	OOMKilled  bool `json:"oom_killed"`
	TimedOut   bool `json:"timed_out"`
}

// Success says whether it ended with code 0.
func (e ProcessEnd) Success() bool { return e.Code != nil && *e.Code == 0 && !e.TimedOut }

// RunEnd is how a run of a sandbox ended.
type RunEnd struct {
	BootID  string      `json:"boot_id"`
	Cause   string      `json:"cause"`
	Process *ProcessEnd `json:"process"`
	Message string      `json:"message"`
	At      time.Time   `json:"at"`
}

// SandboxSummary is one sandbox in a list.
type SandboxSummary struct {
	Name      string            `json:"name"`
	ID        string            `json:"id"`
	Status    string            `json:"status"`
	Image     string            `json:"image"`
	Command   []string          `json:"command"`
	CreatedAt time.Time         `json:"created_at"`
	StartedAt *time.Time        `json:"started_at"`
	LastEnd   *RunEnd           `json:"last_end"`
	Restarts  int               `json:"restarts"`
	Ports     []string          `json:"ports"`
	Labels    map[string]string `json:"labels"`
	Engine    string            `json:"engine"`
}

// SandboxNetwork is the network of one sandbox.
type SandboxNetwork struct {
	// Addresses of the guest and its gateway; nil: there is no network but loopback.
	Addresses map[string]any `json:"addresses"`
	// The policy in the order it is tried, one line for each rule and default.
	Policy []string `json:"policy"`
}

// SandboxDetail is everything about one sandbox.
type SandboxDetail struct {
	SandboxSummary
	Spec               json.RawMessage `json:"spec"`
	ImageDigest        string          `json:"image_digest"`
	BootID             string          `json:"boot_id"`
	VMMPID             int             `json:"vmm_pid"`
	EngineReason       string          `json:"engine_reason"`
	Network            SandboxNetwork  `json:"network"`
	RootAllocatedBytes uint64          `json:"root_allocated_bytes"`
	Directory          string          `json:"directory"`
	HeartbeatFile      string          `json:"heartbeat_file"`
	NextTryAt          *time.Time      `json:"next_try_at"`
	// MemoryAllocatedBytes is what the memory that it sleeps with takes of the disk; nil while there is none.
	MemoryAllocatedBytes *uint64 `json:"memory_allocated_bytes"`
	IdleForMS            *uint64 `json:"idle_for_ms"`
	StopsInMS            *uint64 `json:"stops_in_ms"`
	LastActivity         string  `json:"last_activity"`
}

// LogRecord is a line of a sandbox's log.
type LogRecord struct {
	Time   time.Time `json:"time"`
	BootID string    `json:"boot_id"`
	Source string    `json:"source"`
	Data   string    `json:"data"`
}

// EventRecord is something that happened to a sandbox.
type EventRecord struct {
	Sequence  uint64    `json:"sequence"`
	Time      time.Time `json:"time"`
	Sandbox   string    `json:"sandbox"`
	SandboxID string    `json:"sandbox_id"`
	BootID    string    `json:"boot_id"`
	Event     string    `json:"event"`
	State     string    `json:"state"`
	Cause     string    `json:"cause"`
	Actor     string    `json:"actor"`
	Message   string    `json:"message"`
}

// GuestMetrics is what a guest says of itself.
type GuestMetrics struct {
	MemoryUsedBytes  uint64 `json:"memory_used_bytes"`
	MemoryTotalBytes uint64 `json:"memory_total_bytes"`
	RootUsedBytes    uint64 `json:"root_used_bytes"`
	RootFreeBytes    uint64 `json:"root_free_bytes"`
	Processes        uint32 `json:"processes"`
}

// SandboxMetrics is the newest sample of one sandbox.
type SandboxMetrics struct {
	Name           string            `json:"name"`
	ID             string            `json:"id"`
	BootID         string            `json:"boot_id"`
	VMMPID         int               `json:"vmm_pid"`
	Status         string            `json:"status"`
	Labels         map[string]string `json:"labels"`
	Restarts       int               `json:"restarts"`
	StartedAt      time.Time         `json:"started_at"`
	Last           bool              `json:"last"`
	Sample         json.RawMessage   `json:"sample"`
	CPUUtilization float64           `json:"cpu_utilization"`
	Guest          *GuestMetrics     `json:"guest"`
}

// MetricsSnapshot is the newest sample of every sandbox.
type MetricsSnapshot struct {
	HostID     string            `json:"host_id"`
	HostName   string            `json:"host_name"`
	InstanceID string            `json:"instance_id"`
	TakenAt    time.Time         `json:"taken_at"`
	States     map[string]uint64 `json:"states"`
	Sandboxes  []SandboxMetrics  `json:"sandboxes"`
}

// ImageHandle is one image in a list.
type ImageHandle struct {
	Digest          string     `json:"digest"`
	References      []string   `json:"references"`
	Platform        string     `json:"platform"`
	CompressedBytes uint64     `json:"compressed_bytes"`
	UnpackedBytes   uint64     `json:"unpacked_bytes"`
	Layers          int        `json:"layers"`
	CreatedAt       *time.Time `json:"created_at"`
	LoadedAt        time.Time  `json:"loaded_at"`
	Pinned          bool       `json:"pinned"`
}

// ImageDetail is everything about one image.
type ImageDetail struct {
	ImageHandle
	Config       ImageConfigDetail  `json:"config"`
	LayerDetails []ImageLayerDetail `json:"layer_details"`
	UsedBy       []string           `json:"used_by"`
	// UsedBySnapshots are the snapshots that need it.
	UsedBySnapshots []string `json:"used_by_snapshots"`
}

// ImageConfigDetail is what an image says about running it.
type ImageConfigDetail struct {
	Digest       string            `json:"digest"`
	Env          []string          `json:"env"`
	Entrypoint   []string          `json:"entrypoint"`
	Cmd          []string          `json:"cmd"`
	WorkingDir   string            `json:"working_dir"`
	User         string            `json:"user"`
	Labels       map[string]string `json:"labels"`
	StopSignal   string            `json:"stop_signal"`
	ExposedPorts []string          `json:"exposed_ports"`
	Volumes      []string          `json:"volumes"`
}

// ImageLayerDetail is one layer of an image.
type ImageLayerDetail struct {
	DiffID          string `json:"diff_id"`
	BlobDigest      string `json:"blob_digest"`
	MediaType       string `json:"media_type"`
	CompressedBytes uint64 `json:"compressed_bytes"`
	UnpackedBytes   uint64 `json:"unpacked_bytes"`
	DataBytes       uint64 `json:"data_bytes"`
	SharedBy        int    `json:"shared_by"`
}

// HistoryPoint is one moment of a sandbox. Counters are cumulative since the boot of their run.
type HistoryPoint struct {
	At                   time.Time `json:"at"`
	BootID               string    `json:"boot_id"`
	CPUUtilization       float64   `json:"cpu_utilization"`
	CPUTimeUS            uint64    `json:"cpu_time_us"`
	MemoryResidentBytes  uint64    `json:"memory_resident_bytes"`
	MemoryLimitBytes     uint64    `json:"memory_limit_bytes"`
	DiskReadBytes        uint64    `json:"disk_read_bytes"`
	DiskWrittenBytes     uint64    `json:"disk_written_bytes"`
	DiskOperations       uint64    `json:"disk_operations"`
	NetworkReceivedBytes uint64    `json:"network_received_bytes"`
	NetworkSentBytes     uint64    `json:"network_sent_bytes"`
	NetworkPackets       uint64    `json:"network_packets"`
	RootAllocatedBytes   uint64    `json:"root_allocated_bytes"`
	// Guest is nil before its first beat.
	Guest *GuestMetrics `json:"guest,omitempty"`
}

// MetricsHistory is the last hour of one sandbox, oldest point first.
type MetricsHistory struct {
	Name   string         `json:"name"`
	ID     string         `json:"id"`
	Points []HistoryPoint `json:"points"`
}

// PingReport says that a sandbox's agent has answered.
type PingReport struct {
	BootID      string `json:"boot_id"`
	RoundTripUS uint64 `json:"round_trip_us"`
}

// SandboxPage is a page of a list; Next, if it is not empty, is what SandboxFilter.After takes for the next one.
type SandboxPage struct {
	Sandboxes []SandboxSummary `json:"sandboxes"`
	Next      string           `json:"next"`
}

// FileTime is a time of a file: seconds since 1970 and nanoseconds below a second.
type FileTime struct {
	Seconds     int64  `json:"seconds"`
	Nanoseconds uint32 `json:"nanoseconds"`
}

// FileAttributes are what stat(2) says of a path in a sandbox.
type FileAttributes struct {
	Mode      uint32   `json:"mode"`
	UID       uint32   `json:"uid"`
	GID       uint32   `json:"gid"`
	Size      uint64   `json:"size"`
	Accessed  FileTime `json:"accessed"`
	Modified  FileTime `json:"modified"`
	Changed   FileTime `json:"changed"`
	Links     uint64   `json:"links"`
	Device    uint64   `json:"device"`
	Inode     uint64   `json:"inode"`
	Allocated uint64   `json:"allocated"`
}

// IsDir says whether it is a directory.
func (a FileAttributes) IsDir() bool { return a.Mode&0o170000 == 0o040000 }

// IsRegular says whether it is a regular file.
func (a FileAttributes) IsRegular() bool { return a.Mode&0o170000 == 0o100000 }

// IsSymlink says whether it is a symbolic link.
func (a FileAttributes) IsSymlink() bool { return a.Mode&0o170000 == 0o120000 }

// DirectoryEntry is one entry of a directory, with its own attributes; nil if it vanished meanwhile.
type DirectoryEntry struct {
	Name       string          `json:"name"`
	Attributes *FileAttributes `json:"attributes"`
}

// FileChange is what to change of a file; nil stays as it is.
type FileChange struct {
	Mode     *uint32   `json:"mode,omitempty"`
	UID      *uint32   `json:"uid,omitempty"`
	GID      *uint32   `json:"gid,omitempty"`
	Size     *uint64   `json:"size,omitempty"`
	Accessed *FileTime `json:"accessed,omitempty"`
	Modified *FileTime `json:"modified,omitempty"`
}

// FileChanged is a record of a watch: Type watching first, then change with its Kind (created, written, removed, attributes, overflow).
type FileChanged struct {
	Type      string `json:"type"`
	Kind      string `json:"kind"`
	Path      string `json:"path"`
	Directory bool   `json:"directory"`
}

// VolumeUser is a sandbox that mounts a volume, where and how.
type VolumeUser struct {
	Sandbox string       `json:"sandbox"`
	Target  string       `json:"target"`
	Options MountOptions `json:"options"`
}

// VolumeDetail is a named volume.
type VolumeDetail struct {
	Name           string       `json:"name"`
	Kind           VolumeKind   `json:"kind"`
	SizeBytes      *uint64      `json:"size_bytes"`
	AllocatedBytes uint64       `json:"allocated_bytes"`
	CreatedAt      time.Time    `json:"created_at"`
	Path           string       `json:"path"`
	Users          []VolumeUser `json:"users"`
}

// PrunedImage is an image that a prune took, or would take.
type PrunedImage struct {
	Digest     string   `json:"digest"`
	References []string `json:"references"`
}

// ImagePruneReport is what a prune took, or would take.
type ImagePruneReport struct {
	DryRun           bool          `json:"dry_run"`
	ImageRefsRemoved uint64        `json:"image_refs_removed"`
	ManifestsRemoved uint64        `json:"manifests_removed"`
	LayersRemoved    uint64        `json:"layers_removed"`
	FsmetaRemoved    uint64        `json:"fsmeta_removed"`
	PartialsRemoved  uint64        `json:"partials_removed"`
	BytesReclaimed   uint64        `json:"bytes_reclaimed"`
	Images           []PrunedImage `json:"images"`
}

// PullLayer is a layer of an image that is being pulled.
type PullLayer struct {
	Digest string `json:"digest"`
	Bytes  uint64 `json:"bytes"`
}

// PullEvent is a step of a pull: Type resolved, layer, layer_done, retry, warning or done, with what belongs to it.
type PullEvent struct {
	Type       string       `json:"type"`
	Digest     string       `json:"digest"`
	Platform   string       `json:"platform"`
	Layers     []PullLayer  `json:"layers"`
	Bytes      uint64       `json:"bytes"`
	Known      bool         `json:"known"`
	What       string       `json:"what"`
	Reason     string       `json:"reason"`
	WaitMS     uint64       `json:"wait_ms"`
	Message    string       `json:"message"`
	WasPresent bool         `json:"was_present"`
	Image      *ImageHandle `json:"image"`
	Error      *apiError    `json:"error"`
}
