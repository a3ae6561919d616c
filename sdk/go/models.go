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
	IdleForMS          *uint64         `json:"idle_for_ms"`
	StopsInMS          *uint64         `json:"stops_in_ms"`
	LastActivity       string          `json:"last_activity"`
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
	DataBytes       uint64 `json:"data_bytes"`
	SharedBy        int    `json:"shared_by"`
}
