package msb

import (
	"maps"
	"net/netip"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// spec is what a sandbox is made of, as the control API has it.
type spec struct {
	Name          string            `json:"name,omitempty"`
	Image         string            `json:"image"`
	Root          string            `json:"root,omitempty"`
	CPUs          *int              `json:"cpus,omitempty"`
	MemoryMiB     *int              `json:"memory_mib,omitempty"`
	RootSizeMiB   int               `json:"root_size_mib,omitempty"`
	Env           map[string]string `json:"env,omitempty"`
	Labels        map[string]string `json:"labels,omitempty"`
	Workdir       string            `json:"workdir,omitempty"`
	User          string            `json:"user,omitempty"`
	Hostname      string            `json:"hostname,omitempty"`
	Entrypoint    *[]string         `json:"entrypoint,omitempty"`
	Command       []string          `json:"command,omitempty"`
	Workload      string            `json:"workload,omitempty"`
	StopSignal    string            `json:"stop_signal,omitempty"`
	StopGraceMS   *int64            `json:"stop_grace_ms,omitempty"`
	Detached      bool              `json:"detached,omitempty"`
	Ephemeral     bool              `json:"ephemeral,omitempty"`
	Engine        string            `json:"engine,omitempty"`
	Restart       *restart          `json:"restart,omitempty"`
	IdleTimeoutMS *int64            `json:"idle_timeout_ms,omitempty"`
	OnIdle        string            `json:"on_idle,omitempty"`
	MaxDurationMS *int64            `json:"max_duration_ms,omitempty"`
	Network       *network          `json:"network,omitempty"`
	Security      Security          `json:"security,omitempty"`
	Mounts        []Mount           `json:"mounts,omitempty"`
	Rlimits       []rlimit          `json:"rlimits,omitempty"`
}

type network struct {
	Enabled        *bool           `json:"enabled,omitempty"`
	Profile        NetworkProfile  `json:"profile,omitempty"`
	Rules          []string        `json:"rules,omitempty"`
	DefaultEgress  string          `json:"default_egress,omitempty"`
	DefaultIngress string          `json:"default_ingress,omitempty"`
	Ports          []publishedPort `json:"ports,omitempty"`
	DNS            *dns            `json:"dns,omitempty"`
}

type dns struct {
	Nameservers []string `json:"nameservers"`
}

type publishedPort struct {
	Bind      string `json:"bind"`
	HostPort  uint16 `json:"host_port"`
	GuestPort uint16 `json:"guest_port"`
	Transport string `json:"transport"`
}

type rlimit struct {
	Resource string `json:"resource"`
	Soft     uint64 `json:"soft"`
	Hard     uint64 `json:"hard"`
}

type restart struct {
	Policy     RestartPolicy `json:"policy"`
	MaxRetries *int          `json:"max_retries,omitempty"`
}

type createRequest struct {
	Spec           spec       `json:"spec"`
	ReplaceGraceMS *int64     `json:"replace_grace_ms,omitempty"`
	Pull           PullPolicy `json:"pull,omitempty"`

	// wrong is the first option that says something it must not.
	wrong error
}

// Option says what a sandbox is made of.
type Option func(*createRequest)

// RestartPolicy says what follows the end of the main workload.
type RestartPolicy string

// The policies, as docker has them.
const (
	RestartDefault       RestartPolicy = "default"
	RestartNo            RestartPolicy = "no"
	RestartOnFailure     RestartPolicy = "on_failure"
	RestartAlways        RestartPolicy = "always"
	RestartUnlessStopped RestartPolicy = "unless_stopped"
)

// NetworkProfile says which addresses a sandbox reaches where no rule decides.
type NetworkProfile string

// The profiles.
const (
	NetworkPublic  NetworkProfile = "public"
	NetworkPrivate NetworkProfile = "private"
	NetworkHost    NetworkProfile = "host"
	NetworkAll     NetworkProfile = "all"
	NetworkNone    NetworkProfile = "none"
)

// Security says what a sandbox's workloads may do.
type Security string

// The security profiles.
const (
	SecurityDefault    Security = "default"
	SecurityRestricted Security = "restricted"
	SecurityStrict     Security = "strict"
)

// PullPolicy says when an image is fetched from its registry.
type PullPolicy string

// The pull policies.
const (
	PullAlways    PullPolicy = "always"
	PullIfMissing PullPolicy = "if_missing"
	PullNever     PullPolicy = "never"
)

// WithImage names the image. Required.
func WithImage(reference string) Option { return func(r *createRequest) { r.Spec.Image = reference } }

// WithRootDirectory makes the root of a directory of this host, in place of an image. The sandbox changes nothing of it. The path is
// absolute and without links.
func WithRootDirectory(path string) Option {
	return func(r *createRequest) { r.Spec.Image, r.Spec.Root = path, "directory" }
}

// WithRootDisk makes the root of a raw disk of this host with an ext4 or EROFS file system, in place of an image. The sandbox changes
// nothing of it.
func WithRootDisk(path string) Option {
	return func(r *createRequest) { r.Spec.Image, r.Spec.Root = path, "disk" }
}

// WithCPUs sets the number of virtual CPUs.
func WithCPUs(count int) Option { return func(r *createRequest) { r.Spec.CPUs = &count } }

// WithMemory sets the guest's memory in MiB.
func WithMemory(mib int) Option { return func(r *createRequest) { r.Spec.MemoryMiB = &mib } }

// WithRootSize sets the size of the writable root in MiB. It takes host space only as it fills.
func WithRootSize(mib int) Option { return func(r *createRequest) { r.Spec.RootSizeMiB = mib } }

// WithEnv sets variables over the image's environment.
func WithEnv(variables map[string]string) Option {
	return func(r *createRequest) { r.Spec.Env = merged(r.Spec.Env, variables) }
}

// WithLabel sets a label over the image's.
func WithLabel(key, value string) Option { return WithLabels(map[string]string{key: value}) }

// WithLabels sets labels over the image's.
func WithLabels(labels map[string]string) Option {
	return func(r *createRequest) { r.Spec.Labels = merged(r.Spec.Labels, labels) }
}

// WithWorkdir sets the working directory in place of the image's.
func WithWorkdir(path string) Option { return func(r *createRequest) { r.Spec.Workdir = path } }

// WithUser sets USER|UID[:GROUP|GID] in place of the image's.
func WithUser(user string) Option { return func(r *createRequest) { r.Spec.User = user } }

// WithHostname sets the hostname in place of the sandbox's name.
func WithHostname(name string) Option { return func(r *createRequest) { r.Spec.Hostname = name } }

// WithEntrypoint sets the entrypoint in place of the image's; no words remove it.
func WithEntrypoint(words ...string) Option {
	return func(r *createRequest) { words := append([]string{}, words...); r.Spec.Entrypoint = &words }
}

// WithCommand gives it a main workload: this command, after the entrypoint. Its end is the sandbox's end.
func WithCommand(words ...string) Option {
	return func(r *createRequest) { r.Spec.Command, r.Spec.Workload = words, "main" }
}

// WithImageCommand gives it the image's own command as main workload.
func WithImageCommand() Option { return func(r *createRequest) { r.Spec.Workload = "main" } }

// WithStopSignal sets the signal that asks the main workload to stop.
func WithStopSignal(signal string) Option {
	return func(r *createRequest) { r.Spec.StopSignal = signal }
}

// WithStopGrace sets the time between that signal and the kill.
func WithStopGrace(grace time.Duration) Option {
	return func(r *createRequest) { r.Spec.StopGraceMS = milliseconds(grace) }
}

// WithDetached lets it outlive this process. Otherwise its stop begins when this process ends, however it ends.
func WithDetached() Option { return func(r *createRequest) { r.Spec.Detached = true } }

// WithEphemeral removes it when it ends.
func WithEphemeral() Option { return func(r *createRequest) { r.Spec.Ephemeral = true } }

// WithEngine picks the engine: auto, kvm or qemu.
func WithEngine(engine string) Option { return func(r *createRequest) { r.Spec.Engine = engine } }

// WithRestart says what follows the end of its main workload.
func WithRestart(policy RestartPolicy) Option {
	return func(r *createRequest) { r.Spec.Restart = &restart{Policy: policy} }
}

// WithRestartOnFailure restarts it when its workload fails, at most this often in a row.
func WithRestartOnFailure(maxRetries int) Option {
	return func(r *createRequest) { r.Spec.Restart = &restart{Policy: RestartOnFailure, MaxRetries: &maxRetries} }
}

// WithIdleTimeout stops it after this time without activity; it wakes on demand.
func WithIdleTimeout(timeout time.Duration) Option {
	return func(r *createRequest) { r.Spec.IdleTimeoutMS = milliseconds(timeout) }
}

// WithRestartWhenIdle starts it anew at its idle timeout, in place of letting it sleep.
func WithRestartWhenIdle() Option { return func(r *createRequest) { r.Spec.OnIdle = "restart" } }

// WithSuspendWhenIdle keeps its memory on disk at its idle timeout; it goes on from it when somebody needs it. Engine kvm.
func WithSuspendWhenIdle() Option { return func(r *createRequest) { r.Spec.OnIdle = "suspend" } }

// WithMaxDuration ends every run after this time.
func WithMaxDuration(duration time.Duration) Option {
	return func(r *createRequest) { r.Spec.MaxDurationMS = milliseconds(duration) }
}

// WithMounts mounts something; Volume makes mounts.
func WithMounts(mounts ...Mount) Option {
	return func(r *createRequest) { r.Spec.Mounts = append(r.Spec.Mounts, mounts...) }
}

// WithPorts publishes ports, each [BIND:]HOST:GUEST[/tcp|/udp]; host port 0 is any free one.
func WithPorts(ports ...string) Option {
	return func(r *createRequest) {
		for _, text := range ports {
			port, err := parsePort(text)
			if err != nil && r.wrong == nil {
				r.wrong = err
			}
			r.network().Ports = append(r.network().Ports, port)
		}
	}
}

// WithNetwork says which addresses it reaches where no rule decides.
func WithNetwork(profile NetworkProfile) Option {
	return func(r *createRequest) { r.network().Profile = profile }
}

// WithNetworkRules adds rules before those of the profile, of which the first that fits decides: deny@example.com:tcp:443.
func WithNetworkRules(rules ...string) Option {
	return func(r *createRequest) { r.network().Rules = append(r.network().Rules, rules...) }
}

// WithNetworkDefaults says what happens to connections that nothing decides: allow, deny, or empty for the profile's word.
func WithNetworkDefaults(egress, ingress string) Option {
	return func(r *createRequest) { r.network().DefaultEgress, r.network().DefaultIngress = egress, ingress }
}

// WithNameservers names upstream name servers in place of the host's own, each ADDRESS:PORT.
func WithNameservers(addresses ...string) Option {
	return func(r *createRequest) { r.network().DNS = &dns{addresses} }
}

// WithoutNetwork gives it no network but loopback.
func WithoutNetwork() Option {
	return func(r *createRequest) { enabled := false; r.network().Enabled = &enabled }
}

// WithSecurity says what its workloads may do.
func WithSecurity(profile Security) Option {
	return func(r *createRequest) { r.Spec.Security = profile }
}

// WithRlimit sets a resource limit of every process msb starts in it: nofile, soft, hard.
func WithRlimit(resource string, soft, hard uint64) Option {
	return func(r *createRequest) { r.Spec.Rlimits = append(r.Spec.Rlimits, rlimit{resource, soft, hard}) }
}

// WithPullPolicy says when its image is fetched from its registry.
func WithPullPolicy(policy PullPolicy) Option { return func(r *createRequest) { r.Pull = policy } }

func (r *createRequest) network() *network {
	if r.Spec.Network == nil {
		r.Spec.Network = &network{}
	}
	return r.Spec.Network
}

func parsePort(text string) (publishedPort, error) {
	wrong := failure("invalid_config", nil, "published port %q; write [BIND:]HOST:GUEST[/tcp|/udp]", text)
	addresses, transport, named := strings.Cut(text, "/")
	if named && transport != "tcp" && transport != "udp" {
		return publishedPort{}, wrong
	}
	if !named {
		transport = "tcp"
	}
	split := strings.LastIndexByte(addresses, ':')
	if split < 0 {
		return publishedPort{}, wrong
	}
	rest, guestText := addresses[:split], addresses[split+1:]
	bind, hostText := "127.0.0.1", rest
	if split := strings.LastIndexByte(rest, ':'); split >= 0 {
		bind, hostText = strings.Trim(rest[:split], "[]"), rest[split+1:]
	}
	host, hostErr := strconv.ParseUint(hostText, 10, 16)
	guest, guestErr := strconv.ParseUint(guestText, 10, 16)
	if _, err := netip.ParseAddr(bind); err != nil || hostErr != nil || guestErr != nil || guest == 0 {
		return publishedPort{}, wrong
	}
	return publishedPort{bind, uint16(host), uint16(guest), transport}, nil
}

// WithReplace removes an existing sandbox of this name first, giving it ten seconds to stop.
func WithReplace() Option { return WithReplaceWithTimeout(10 * time.Second) }

// WithReplaceWithTimeout is WithReplace with another time.
func WithReplaceWithTimeout(grace time.Duration) Option {
	return func(r *createRequest) { r.ReplaceGraceMS = milliseconds(grace) }
}

func merged(base, over map[string]string) map[string]string {
	result := maps.Clone(base)
	if result == nil {
		result = map[string]string{}
	}
	maps.Copy(result, over)
	return result
}

func milliseconds(duration time.Duration) *int64 {
	value := duration.Milliseconds()
	return &value
}

var namePattern = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$`)

func checkName(name string) error {
	// $ also matches before a last newline.
	if !namePattern.MatchString(name) || strings.ContainsRune(name, '\n') {
		return failure("invalid_name", nil, "sandbox name %q breaks the rule for names", name)
	}
	return nil
}

func checkEnv(env map[string]string) error {
	for name, value := range env {
		if name == "" || strings.ContainsAny(name, "=\x00") {
			return failure("invalid_config", nil, "environment variable name %q is empty or has '=' or a zero byte", name)
		}
		if strings.ContainsRune(value, 0) {
			return failure("invalid_config", nil, "environment variable %s has a zero byte in its value", name)
		}
	}
	return nil
}

// newCreateRequest checks what can be checked before any request is made.
func newCreateRequest(name string, options []Option) (*createRequest, error) {
	var request createRequest
	for _, option := range options {
		option(&request)
	}
	request.Spec.Name = name
	if request.wrong != nil {
		return nil, request.wrong
	}
	made := &request.Spec
	if name != "" {
		if err := checkName(name); err != nil {
			return nil, err
		}
	}
	switch {
	case made.Image == "":
		return nil, failure("invalid_config", nil, "image is required")
	case made.CPUs != nil && *made.CPUs <= 0:
		return nil, failure("invalid_config", nil, "cpus must be greater than 0")
	case made.MemoryMiB != nil && *made.MemoryMiB <= 0:
		return nil, failure("invalid_config", nil, "memory must be greater than 0")
	}
	for what, duration := range map[string]*int64{
		"stop grace": made.StopGraceMS, "idle timeout": made.IdleTimeoutMS, "max duration": made.MaxDurationMS, "replace grace": request.ReplaceGraceMS,
	} {
		if duration != nil && *duration < 0 {
			return nil, failure("invalid_config", nil, "%s must not be negative", what)
		}
	}
	for key := range made.Labels {
		if key == "" {
			return nil, failure("invalid_label", nil, "label key must not be empty")
		}
		for _, prefix := range []string{"sandbox.", "microsandbox.", "service."} {
			if strings.HasPrefix(key, prefix) {
				return nil, failure("invalid_label", nil, "label key '%s' uses reserved prefix '%s'", key, prefix)
			}
		}
	}
	return &request, checkEnv(made.Env)
}

// SandboxFilter says which sandboxes a list holds.
type SandboxFilter struct {
	terms     []string
	selectors []string
	limit     int
	after     string
}

// NewSandboxFilter lets everything through.
func NewSandboxFilter() *SandboxFilter { return &SandboxFilter{} }

// WithLabels asks for these values; all must fit.
func (f *SandboxFilter) WithLabels(labels map[string]string) *SandboxFilter {
	for key, value := range labels {
		f.terms = append(f.terms, key+"="+value)
	}
	return f
}

// WithLabelTerm adds a term: KEY=VALUE is exact, KEY asks whether it exists.
func (f *SandboxFilter) WithLabelTerm(term string) *SandboxFilter {
	f.terms = append(f.terms, term)
	return f
}

// WithSelector adds an expression: team in (ml,web),!debug.
func (f *SandboxFilter) WithSelector(expression string) *SandboxFilter {
	f.selectors = append(f.selectors, expression)
	return f
}

// Limit asks for at most so many.
func (f *SandboxFilter) Limit(count int) *SandboxFilter { f.limit = count; return f }

// After asks for those after the page whose Next this is.
func (f *SandboxFilter) After(next string) *SandboxFilter { f.after = next; return f }

func (f *SandboxFilter) values() url.Values {
	query := url.Values{}
	if f == nil {
		return query
	}
	if len(f.terms) > 0 {
		query["label"] = f.terms
	}
	if len(f.selectors) > 0 {
		query["selector"] = f.selectors
	}
	if f.limit > 0 {
		query.Set("limit", strconv.Itoa(f.limit))
	}
	if f.after != "" {
		query.Set("after", f.after)
	}
	return query
}

// execRequest is a command to run, as the control API has it.
type execRequest struct {
	Command   []string          `json:"command"`
	Env       map[string]string `json:"env,omitempty"`
	Workdir   string            `json:"workdir,omitempty"`
	User      string            `json:"user,omitempty"`
	Stdin     bool              `json:"stdin,omitempty"`
	Terminal  *terminalSize     `json:"terminal,omitempty"`
	TimeoutMS *int64            `json:"timeout_ms,omitempty"`

	input        []byte
	outputLenMax int
}

type terminalSize struct {
	Rows    uint16 `json:"rows"`
	Columns uint16 `json:"columns"`
}

// ExecOption says how a command is run.
type ExecOption func(*execRequest)

// WithExecEnv sets variables over the sandbox's environment.
func WithExecEnv(variables map[string]string) ExecOption {
	return func(r *execRequest) { r.Env = merged(r.Env, variables) }
}

// WithExecWorkdir sets the working directory.
func WithExecWorkdir(path string) ExecOption { return func(r *execRequest) { r.Workdir = path } }

// WithExecUser sets USER|UID[:GROUP|GID].
func WithExecUser(user string) ExecOption { return func(r *execRequest) { r.User = user } }

// WithExecTimeout kills the whole process group after this time.
func WithExecTimeout(timeout time.Duration) ExecOption {
	return func(r *execRequest) { r.TimeoutMS = milliseconds(timeout) }
}

// WithExecTerminal gives it a terminal of this size.
func WithExecTerminal(rows, columns uint16) ExecOption {
	return func(r *execRequest) { r.Terminal = &terminalSize{rows, columns} }
}

// WithExecStdin gives it these bytes as its whole stdin (Exec and Shell).
func WithExecStdin(input []byte) ExecOption {
	return func(r *execRequest) { r.Stdin, r.input = true, input }
}

// WithExecStdinPipe forwards stdin: write to the handle (ExecStream).
func WithExecStdinPipe() ExecOption { return func(r *execRequest) { r.Stdin = true } }

// WithExecOutputLenMax sets the most output that Exec keeps, in bytes.
func WithExecOutputLenMax(bytes int) ExecOption {
	return func(r *execRequest) { r.outputLenMax = bytes }
}

func newExecRequest(command []string, options []ExecOption) (*execRequest, error) {
	request := &execRequest{Command: command, outputLenMax: outputLenMax}
	for _, option := range options {
		option(request)
	}
	if len(command) == 0 {
		return nil, failure("invalid_config", nil, "a command is required")
	}
	for _, word := range command {
		if strings.ContainsRune(word, 0) {
			return nil, failure("invalid_config", nil, "a word of the command has a zero byte")
		}
	}
	if request.TimeoutMS != nil && *request.TimeoutMS < 0 {
		return nil, failure("invalid_config", nil, "timeout must not be negative")
	}
	return request, checkEnv(request.Env)
}
