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
	"os"
	"strings"
	"syscall"
	"time"

	msb "github.com/msb-project/msb/sdk/go"
)

// arguments are those of every call; each takes what it knows.
type arguments struct {
	Name         *string           `json:"name"`
	Image        string            `json:"image"`
	CPUs         *int              `json:"cpus"`
	MemoryMiB    *int              `json:"memory_mib"`
	Env          map[string]string `json:"env"`
	Labels       json.RawMessage   `json:"labels"`
	Workdir      string            `json:"workdir"`
	User         string            `json:"user"`
	Hostname     string            `json:"hostname"`
	Command      []string          `json:"command"`
	Entrypoint   []string          `json:"entrypoint"`
	Detached     bool              `json:"detached"`
	Ephemeral    bool              `json:"ephemeral"`
	Replace      bool              `json:"replace"`
	Restart      string            `json:"restart"`
	IdleMS       *int64            `json:"idle_timeout_ms"`
	MaxMS        *int64            `json:"max_duration_ms"`
	TimeoutMS    *int64            `json:"timeout_ms"`
	GraceMS      *int64            `json:"grace_ms"`
	OutputLenMax *int              `json:"output_len_max"`
	Stdin        json.RawMessage   `json:"stdin"`
	Terminal     []uint16          `json:"terminal"`
	Actions      []action          `json:"actions"`
	Script       string            `json:"script"`
	Count        int               `json:"count"`
	Tail         uint64            `json:"tail"`
	Source       string            `json:"source"`
	Force        bool              `json:"force"`
	Path         string            `json:"path"`
	Reference    string            `json:"reference"`
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
		Detached bool `json:"detached"`
	}
	_ = json.Unmarshal(detail.Spec, &spec)
	var cause any
	if detail.LastEnd != nil {
		cause = detail.LastEnd.Cause
	}
	return value{
		"name": detail.Name, "status": detail.Status, "image": detail.Image, "labels": detail.Labels, "cause": cause,
		"detached": spec.Detached,
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
	if len(what.Resize) == 2 {
		if err := handle.Resize(what.Resize[0], what.Resize[1]); err != nil {
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
		var terms []string
		_ = json.Unmarshal(a.Labels, &terms)
		filter := msb.NewSandboxFilter()
		for _, term := range terms {
			filter.WithLabelTerm(term)
		}
		found, err := client.List(ctx, filter)
		names := []string{}
		for _, box := range found {
			names = append(names, box.Name)
		}
		return names, err
	case "start":
		box, err := client.Start(ctx, a.name())
		if err != nil {
			return nil, err
		}
		return detailValue(box.Detail()), nil
	case "remove":
		return nil, client.Remove(ctx, a.name(), a.Force)
	case "image_load", "image_list", "image_inspect", "image_remove":
		return image(ctx, client, name, a)
	}
	box, err := client.Get(ctx, a.name())
	if err != nil {
		return nil, err
	}
	return d.onSandbox(ctx, box, name, a)
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
	default:
		return nil, client.RemoveImage(ctx, a.Reference, a.Force)
	}
}

func (d *driver) onSandbox(ctx context.Context, box *msb.Sandbox, name string, a arguments) (any, error) {
	var err error
	switch name {
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
		for record, err := range box.Logs(ctx, msb.LogQuery{Tail: a.Tail, Source: a.Source}) {
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
			})
		default:
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
}
