// The Go side of the conformance suite: reads calls as JSON lines, carries each out with the package, answers with JSON lines.
//
// Started by `cargo xtask test --only sdk`. It judges nothing: what is expected is written in sdk/conformance/suite.json.
package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"strings"
	"syscall"
	"time"

	msb "github.com/msb-project/msb/sdk/go"
)

// arguments are those of every call; each takes what it knows.
type arguments struct {
	Name          *string           `json:"name"`
	Image         string            `json:"image"`
	RootDirectory string            `json:"root_directory"`
	CPUs          *int              `json:"cpus"`
	MemoryMiB     *int              `json:"memory_mib"`
	Env           map[string]string `json:"env"`
	Labels        json.RawMessage   `json:"labels"`
	Workdir       string            `json:"workdir"`
	User          string            `json:"user"`
	Hostname      string            `json:"hostname"`
	Command       []string          `json:"command"`
	Entrypoint    []string          `json:"entrypoint"`
	Detached      bool              `json:"detached"`
	Ephemeral     bool              `json:"ephemeral"`
	Replace       bool              `json:"replace"`
	Restart       string            `json:"restart"`
	IdleMS        *int64            `json:"idle_timeout_ms"`
	MaxMS         *int64            `json:"max_duration_ms"`
	TimeoutMS     *int64            `json:"timeout_ms"`
	GraceMS       *int64            `json:"grace_ms"`
	OutputLenMax  *int              `json:"output_len_max"`
	Stdin         json.RawMessage   `json:"stdin"`
	Terminal      []uint16          `json:"terminal"`
	Actions       []action          `json:"actions"`
	Script        string            `json:"script"`
	Count         int               `json:"count"`
	Tail          uint64            `json:"tail"`
	Source        string            `json:"source"`
	Force         bool              `json:"force"`
	Path          string            `json:"path"`
	Reference     string            `json:"reference"`
	Selector      string            `json:"selector"`
	Limit         int               `json:"limit"`
	Grep          string            `json:"grep"`
	Mounts        []mountArguments  `json:"mounts"`
	Ports         []string          `json:"ports"`
	Network       *networkArguments `json:"network"`
	Security      msb.Security      `json:"security"`
	Rlimits       map[string]uint64 `json:"rlimits"`
	Pull          msb.PullPolicy    `json:"pull"`
	Alias         string            `json:"alias"`
	IntervalMS    int64             `json:"interval_ms"`
	Target        string            `json:"target"`
	Content       string            `json:"content"`
	Mode          *uint32           `json:"mode"`
	Parents       bool              `json:"parents"`
	Recursive     bool              `json:"recursive"`
	Follow        *bool             `json:"follow"`
	Offset        int64             `json:"offset"`
	Length        *int64            `json:"length"`
	Touch         string            `json:"touch"`
	Kind          msb.VolumeKind    `json:"kind"`
	SizeMiB       int               `json:"size_mib"`
	Tag           string            `json:"tag"`
	DryRun        bool              `json:"dry_run"`
}

type mountArguments struct {
	Kind     string `json:"kind"`
	Name     string `json:"name"`
	Path     string `json:"path"`
	Target   string `json:"target"`
	SizeMiB  int    `json:"size_mib"`
	ReadOnly bool   `json:"read_only"`
}

func (m mountArguments) mount() msb.Mount {
	mount := msb.Volume.Tmpfs(m.Target, m.SizeMiB)
	switch m.Kind {
	case "bind":
		mount = msb.Volume.Bind(m.Path, m.Target)
	case "named":
		mount = msb.Volume.Named(m.Name, m.Target)
	}
	if m.ReadOnly {
		return mount.ReadOnly()
	}
	return mount
}

type networkArguments struct {
	Profile msb.NetworkProfile `json:"profile"`
	Rules   []string           `json:"rules"`
}

type action struct {
	After      string   `json:"after"`
	Write      *string  `json:"write"`
	Signal     string   `json:"signal"`
	Resize     []uint16 `json:"resize"`
	CloseStdin bool     `json:"close_stdin"`
}

type value map[string]any

type driver struct {
	client *msb.Client
	held   []*msb.ExecHandle
}

var signals = map[string]syscall.Signal{"SIGTERM": syscall.SIGTERM, "SIGINT": syscall.SIGINT, "SIGKILL": syscall.SIGKILL, "SIGUSR1": syscall.SIGUSR1}

func detailValue(detail msb.SandboxDetail) value {
	var spec struct {
		Detached bool   `json:"detached"`
		Security string `json:"security"`
		Network  struct {
			Profile string   `json:"profile"`
			Rules   []string `json:"rules"`
		} `json:"network"`
		Mounts []msb.Mount `json:"mounts"`
	}
	_ = json.Unmarshal(detail.Spec, &spec)
	mounts := []string{}
	for _, mount := range spec.Mounts {
		mounts = append(mounts, mount.Target)
	}
	var cause any
	if detail.LastEnd != nil {
		cause = detail.LastEnd.Cause
	}
	return value{
		"name": detail.Name, "status": detail.Status, "image": detail.Image, "labels": detail.Labels, "cause": cause,
		"detached": spec.Detached, "security": spec.Security, "network": spec.Network.Profile, "rules": len(spec.Network.Rules),
		"ports": len(detail.Ports), "mounts": mounts,
	}
}

func outputValue(output *msb.ExecOutput) value {
	return value{
		"exit_code": output.Code, "signal": output.Signal, "timed_out": output.TimedOut, "stdout": output.StdoutText(),
		"stderr": output.StderrText(),
	}
}

func (d *driver) connect(ctx context.Context) (*msb.Client, error) {
	if d.client == nil {
		client, err := msb.Connect(ctx)
		if err != nil {
			return nil, err
		}
		d.client = client
	}
	return d.client, nil
}

func (a arguments) name() string {
	if a.Name == nil {
		return ""
	}
	return *a.Name
}

func (a arguments) create() []msb.Option {
	var options []msb.Option
	add := func(on bool, option msb.Option) {
		if on {
			options = append(options, option)
		}
	}
	var labels map[string]string
	_ = json.Unmarshal(a.Labels, &labels)
	add(a.Image != "", msb.WithImage(a.Image))
	add(a.RootDirectory != "", msb.WithRootDirectory(a.RootDirectory))
	if a.CPUs != nil {
		options = append(options, msb.WithCPUs(*a.CPUs))
	}
	if a.MemoryMiB != nil {
		options = append(options, msb.WithMemory(*a.MemoryMiB))
	}
	add(a.Env != nil, msb.WithEnv(a.Env))
	add(labels != nil, msb.WithLabels(labels))
	add(a.Workdir != "", msb.WithWorkdir(a.Workdir))
	add(a.User != "", msb.WithUser(a.User))
	add(a.Hostname != "", msb.WithHostname(a.Hostname))
	add(a.Entrypoint != nil, msb.WithEntrypoint(a.Entrypoint...))
	add(a.Command != nil, msb.WithCommand(a.Command...))
	add(a.Detached, msb.WithDetached())
	add(a.Ephemeral, msb.WithEphemeral())
	add(a.Replace, msb.WithReplace())
	add(a.Restart != "", msb.WithRestart(msb.RestartPolicy(a.Restart)))
	for _, mount := range a.Mounts {
		options = append(options, msb.WithMounts(mount.mount()))
	}
	add(a.Ports != nil, msb.WithPorts(a.Ports...))
	if a.Network != nil {
		options = append(options, msb.WithNetwork(a.Network.Profile), msb.WithNetworkRules(a.Network.Rules...))
	}
	add(a.Security != "", msb.WithSecurity(a.Security))
	for name, limit := range a.Rlimits {
		options = append(options, msb.WithRlimit(name, limit, limit))
	}
	add(a.Pull != "", msb.WithPullPolicy(a.Pull))
	if a.IdleMS != nil {
		options = append(options, msb.WithIdleTimeout(time.Duration(*a.IdleMS)*time.Millisecond))
	}
	if a.MaxMS != nil {
		options = append(options, msb.WithMaxDuration(time.Duration(*a.MaxMS)*time.Millisecond))
	}
	return options
}

func (a arguments) exec() []msb.ExecOption {
	var options []msb.ExecOption
	if a.Env != nil {
		options = append(options, msb.WithExecEnv(a.Env))
	}
	if a.Workdir != "" {
		options = append(options, msb.WithExecWorkdir(a.Workdir))
	}
	if a.User != "" {
		options = append(options, msb.WithExecUser(a.User))
	}
	if a.TimeoutMS != nil {
		options = append(options, msb.WithExecTimeout(time.Duration(*a.TimeoutMS)*time.Millisecond))
	}
	if a.OutputLenMax != nil {
		options = append(options, msb.WithExecOutputLenMax(*a.OutputLenMax))
	}
	if len(a.Terminal) == 2 {
		options = append(options, msb.WithExecTerminal(a.Terminal[0], a.Terminal[1]))
	}
	var text string
	if json.Unmarshal(a.Stdin, &text) == nil && a.Stdin != nil {
		options = append(options, msb.WithExecStdin([]byte(text)))
	} else if string(a.Stdin) == "true" {
		options = append(options, msb.WithExecStdinPipe())
	}
	return options
}

func (d *driver) stream(ctx context.Context, box *msb.Sandbox, a arguments) (any, error) {
	handle, err := box.ExecStream(ctx, a.Command, a.exec()...)
	if err != nil {
		return nil, err
	}
	defer handle.Close()
	var output msb.ExecOutput
	for event, err := range handle.Events() {
		if err != nil {
			return nil, err
		}
		switch event := event.(type) {
		case msb.Stdout:
			output.Stdout = append(output.Stdout, event.Data...)
		case msb.Stderr:
			output.Stderr = append(output.Stderr, event.Data...)
		case msb.Exited:
			output.ProcessEnd = event.End
			return outputValue(&output), nil
		}
		for len(a.Actions) > 0 && bytes.Contains(output.Stdout, []byte(a.Actions[0].After)) {
			if err := act(handle, a.Actions[0]); err != nil {
				return nil, err
			}
			a.Actions = a.Actions[1:]
		}
	}
	return nil, errors.New("a stream without an end")
}

func act(handle *msb.ExecHandle, what action) error {
	if len(what.Resize) == 2 {
		if err := handle.Resize(what.Resize[0], what.Resize[1]); err != nil {
			return err
		}
	}
	if what.Write != nil {
		if _, err := handle.Write([]byte(*what.Write)); err != nil {
			return err
		}
	}
	if what.Signal != "" {
		if err := handle.Signal(signals[what.Signal]); err != nil {
			return err
		}
	}
	if what.CloseStdin {
		return handle.CloseStdin()
	}
	return nil
}

func (d *driver) call(ctx context.Context, name string, a arguments) (any, error) {
	// Without a client, so that a refusal comes before any connection.
	if name == "create" {
		box, err := msb.CreateSandbox(ctx, a.name(), a.create()...)
		if err != nil {
			return nil, err
		}
		return detailValue(box.Detail()), nil
	}
	client, err := d.connect(ctx)
	if err != nil {
		return nil, err
	}
	switch name {
	case "connect":
		return value{"api_version": client.Version().APIVersion}, nil
	case "shutdown":
		return nil, client.Shutdown(ctx)
	case "list":
		found, err := client.List(ctx, a.filter())
		return names(found), err
	case "pages":
		pages := [][]string{}
		for filter := a.filter().Limit(a.Limit); ; {
			page, err := client.ListPage(ctx, filter)
			if err != nil {
				return nil, err
			}
			pages = append(pages, names(page.Sandboxes))
			if page.Next == "" {
				return pages, nil
			}
			filter.After(page.Next)
		}
	case "volume_create", "volume_get", "volume_list", "volume_remove":
		return volume(ctx, client, name, a)
	case "settle":
		debug.FreeOSMemory()
		return nil, nil
	case "first_byte":
		return firstByte(ctx, client, a)
	case "start":
		box, err := client.Start(ctx, a.name())
		if err != nil {
			return nil, err
		}
		return detailValue(box.Detail()), nil
	case "remove":
		return nil, client.Remove(ctx, a.name(), a.Force)
	case "image_load", "image_list", "image_inspect", "image_remove", "image_tag", "image_save", "image_prune", "image_pull":
		return image(ctx, client, name, a)
	}
	box, err := client.Get(ctx, a.name())
	if err != nil {
		return nil, err
	}
	return d.onSandbox(ctx, box, name, a)
}

func firstByte(ctx context.Context, client *msb.Client, a arguments) (any, error) {
	began := time.Now()
	box, err := client.Create(ctx, "", msb.WithImage(a.Image), msb.WithEphemeral())
	if err != nil {
		return nil, err
	}
	defer box.Close()
	handle, err := box.ExecStream(ctx, []string{"echo", "x"})
	if err != nil {
		return nil, err
	}
	defer handle.Close()
	for event, err := range handle.Events() {
		if err != nil {
			return nil, err
		}
		if _, ok := event.(msb.Stdout); ok {
			break
		}
	}
	return time.Since(began).Seconds() * 1000, nil
}

func (a arguments) filter() *msb.SandboxFilter {
	var terms []string
	_ = json.Unmarshal(a.Labels, &terms)
	filter := msb.NewSandboxFilter()
	for _, term := range terms {
		filter.WithLabelTerm(term)
	}
	if a.Selector != "" {
		filter.WithSelector(a.Selector)
	}
	return filter
}

func names(found []msb.SandboxSummary) []string {
	names := []string{}
	for _, box := range found {
		names = append(names, box.Name)
	}
	return names
}

func volume(ctx context.Context, client *msb.Client, name string, a arguments) (any, error) {
	shown := func(found *msb.VolumeDetail, err error) (any, error) {
		if err != nil {
			return nil, err
		}
		users := []string{}
		for _, user := range found.Users {
			users = append(users, user.Sandbox)
		}
		return value{"name": found.Name, "kind": found.Kind, "size_bytes": found.SizeBytes, "users": users}, nil
	}
	switch name {
	case "volume_create":
		if a.Kind == "" {
			a.Kind = msb.VolumeDir
		}
		return shown(client.CreateVolume(ctx, a.name(), a.Kind, a.SizeMiB))
	case "volume_get":
		return shown(client.Volume(ctx, a.name()))
	case "volume_list":
		found, err := client.Volumes(ctx)
		names := []string{}
		for _, volume := range found {
			names = append(names, volume.Name)
		}
		return names, err
	default:
		return nil, client.RemoveVolume(ctx, a.name())
	}
}

func files(ctx context.Context, files *msb.Fs, name string, a arguments) (any, error) {
	sized := func(found *msb.FileAttributes, err error) (any, error) {
		if err != nil {
			return nil, err
		}
		return value{"size": found.Size}, nil
	}
	switch name {
	case "fs_mkdir":
		if a.Parents {
			return nil, files.MkdirAll(ctx, a.Path)
		}
		return nil, files.Mkdir(ctx, a.Path)
	case "fs_write":
		return sized(files.Write(ctx, a.Path, strings.NewReader(a.Content), a.Mode))
	case "fs_append":
		return sized(files.Append(ctx, a.Path, []byte(a.Content)))
	case "fs_read":
		if a.Length == nil {
			content, err := files.ReadFile(ctx, a.Path)
			return string(content), err
		}
		part, err := files.Open(ctx, a.Path, a.Offset, *a.Length)
		if err != nil {
			return nil, err
		}
		defer part.Close()
		content, err := io.ReadAll(part)
		return string(content), err
	case "fs_stat":
		look := files.Stat
		if a.Follow != nil && !*a.Follow {
			look = files.Lstat
		}
		found, err := look(ctx, a.Path)
		if err != nil {
			return nil, err
		}
		kind := "other"
		switch {
		case found.IsSymlink():
			kind = "symlink"
		case found.IsRegular():
			kind = "file"
		case found.IsDir():
			kind = "directory"
		}
		return value{"kind": kind, "size": found.Size, "mode": found.Mode & 0o7777}, nil
	case "fs_chmod":
		return nil, files.Chmod(ctx, a.Path, *a.Mode)
	case "fs_symlink":
		return nil, files.Symlink(ctx, a.Target, a.Path)
	case "fs_read_link":
		return files.Readlink(ctx, a.Path)
	case "fs_real_path":
		return files.RealPath(ctx, a.Path)
	case "fs_list":
		found, err := files.ReadDir(ctx, a.Path)
		names := []string{}
		for _, entry := range found {
			names = append(names, entry.Name)
		}
		return names, err
	case "fs_rename":
		return nil, files.Rename(ctx, a.Path, a.Target)
	case "fs_exists":
		return files.Exists(ctx, a.Path)
	case "fs_remove":
		if a.Recursive {
			return nil, files.RemoveAll(ctx, a.Path)
		}
		return nil, files.Remove(ctx, a.Path)
	}
	for record, err := range files.Watch(ctx, a.Path, false) {
		if err != nil {
			return nil, err
		}
		if record.Type == "watching" {
			if _, err := files.Append(ctx, a.Touch, []byte("seen")); err != nil {
				return nil, err
			}
		} else if record.Kind == "created" {
			return record.Path, nil
		}
	}
	return nil, errors.New("a watch without an end")
}

func copied(report *msb.CopyReport, err error) (any, error) {
	if err != nil {
		return nil, err
	}
	return append([]string{}, report.Warnings...), nil
}

func image(ctx context.Context, client *msb.Client, name string, a arguments) (any, error) {
	switch name {
	case "image_load":
		loaded, err := msb.Image.Load(ctx, a.Path)
		references := [][]string{}
		for _, image := range loaded {
			references = append(references, image.References)
		}
		return references, err
	case "image_list":
		images, err := client.Images(ctx)
		references := []string{}
		for _, image := range images {
			references = append(references, append(image.References, image.Digest)[0])
		}
		return references, err
	case "image_inspect":
		image, err := client.InspectImage(ctx, a.Reference)
		if err != nil {
			return nil, err
		}
		return value{
			"references": image.References, "layers": image.Layers, "layer_details": len(image.LayerDetails),
			"user": image.Config.User, "working_dir": image.Config.WorkingDir, "used_by": image.UsedBy,
		}, nil
	case "image_tag":
		image, err := client.TagImage(ctx, a.Reference, a.Tag)
		if err != nil {
			return nil, err
		}
		return image.References, nil
	case "image_save":
		return nil, msb.Image.Save(ctx, a.Path, a.Reference)
	case "image_prune":
		return client.PruneImages(ctx, msb.PruneRequest{DryRun: a.DryRun})
	case "image_pull":
		steps := []string{}
		heard := func(event msb.PullEvent) { steps = append(steps, event.Type) }
		image, err := client.PullImage(ctx, msb.PullRequest{Reference: a.Reference, Insecure: true}, heard)
		if err != nil {
			return nil, err
		}
		return value{"references": image.References, "steps": steps}, nil
	default:
		return nil, client.RemoveImage(ctx, a.Reference, a.Force)
	}
}

func (d *driver) onSandbox(ctx context.Context, box *msb.Sandbox, name string, a arguments) (any, error) {
	var err error
	if strings.HasPrefix(name, "fs_") {
		return files(ctx, box.Fs(), name, a)
	}
	switch name {
	case "copy_into":
		return copied(box.CopyInto(ctx, a.Path, a.Target))
	case "copy_out":
		return copied(box.CopyOut(ctx, a.Path, a.Target))
	case "ping":
		report, err := box.Ping(ctx)
		return err == nil && report.RoundTripUS > 0, err
	case "ssh_config":
		found, err := box.SSHConfig(ctx, a.Alias)
		if err != nil {
			return nil, err
		}
		return value{"alias": found.Alias, "config": found.Config}, nil
	case "metrics_stream":
		names := []string{}
		for sample, err := range box.MetricsStream(ctx, time.Duration(a.IntervalMS)*time.Millisecond) {
			if err != nil {
				return nil, err
			}
			if names = append(names, sample.Name); len(names) == a.Count {
				break
			}
		}
		return names, nil
	case "metrics_history":
		history, err := box.MetricsHistory(ctx, 0, 0)
		if err != nil {
			return nil, err
		}
		return value{"name": history.Name, "has_points": len(history.Points) > 0}, nil
	case "get":
	case "exec", "exec_check", "shell":
		var output *msb.ExecOutput
		if name == "shell" {
			output, err = box.Shell(ctx, a.Script)
		} else {
			output, err = box.Exec(ctx, a.Command, a.exec()...)
		}
		if err != nil {
			return nil, err
		}
		if name == "exec_check" {
			return nil, output.Check()
		}
		return outputValue(output), nil
	case "exec_many":
		good := 0
		for range a.Count {
			output, err := box.Exec(ctx, []string{"true"})
			if err != nil {
				return nil, err
			}
			if output.Success() {
				good++
			}
		}
		return good, nil
	case "exec_stream":
		return d.stream(ctx, box, a)
	case "exec_hold":
		handle, err := box.ExecStream(ctx, a.Command)
		if err != nil {
			return nil, err
		}
		d.held = append(d.held, handle)
		_, err = handle.Next()
		return nil, err
	case "logs":
		var text strings.Builder
		for record, err := range box.Logs(ctx, msb.LogQuery{Tail: a.Tail, Source: a.Source, Grep: a.Grep}) {
			if err != nil {
				return nil, err
			}
			text.WriteString(record.Data)
		}
		return text.String(), nil
	case "events":
		states := []string{}
		for event, err := range box.Events(ctx, msb.EventQuery{}) {
			if err != nil {
				return nil, err
			}
			if event.Event == "state" {
				states = append(states, event.State)
			}
		}
		return states, nil
	case "metrics":
		sample, err := box.Metrics(ctx)
		if err != nil || sample == nil {
			return nil, err
		}
		return value{"name": sample.Name, "status": sample.Status}, nil
	case "touch":
		err = box.Touch(ctx)
	case "detach":
		err = box.Detach(ctx)
	case "stop":
		if a.GraceMS != nil {
			err = box.StopWithTimeout(ctx, time.Duration(*a.GraceMS)*time.Millisecond)
		} else {
			err = box.Stop(ctx)
		}
	case "kill":
		err = box.Kill(ctx)
	case "restart":
		err = box.Restart(ctx)
	case "wait":
		_, err = box.WaitUntilStopped(ctx)
	default:
		err = fmt.Errorf("no call %s", name)
	}
	return detailValue(box.Detail()), err
}

func main() {
	d := &driver{}
	input := bufio.NewScanner(os.Stdin)
	input.Buffer(nil, 16<<20)
	output := json.NewEncoder(os.Stdout)
	for input.Scan() {
		var request struct {
			Call string    `json:"call"`
			Args arguments `json:"args"`
		}
		if err := json.Unmarshal(input.Bytes(), &request); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		result, err := d.call(context.Background(), request.Call, request.Args)
		var typed *msb.Error
		switch {
		case err == nil:
			_ = output.Encode(value{"ok": result})
		case errors.As(err, &typed):
			_ = output.Encode(value{
				"error": typed.Code, "message": typed.Error(), "hint": typed.Hint, "details": append([]string{}, typed.Details...),
				"errno": int(typed.Errno),
			})
		default:
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
}
