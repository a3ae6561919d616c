package msb

import (
	"context"
	"maps"
	"net/http"
	"os"
	"path/filepath"
)

// Volume holds the calls about named volumes of the service of this environment, and mounts of every kind: msb.Volume.Tmpfs("/cache", 64).
var Volume volumes

type volumes struct{}

// VolumeKind is the kind of a named volume.
type VolumeKind string

// The kinds: a directory that sandboxes share, and a disk that one at a time has.
const (
	VolumeDir  VolumeKind = "dir"
	VolumeDisk VolumeKind = "disk"
)

// Mount is one mount; Volume makes them.
type Mount struct {
	Target  string         `json:"target"`
	Source  map[string]any `json:"source"`
	Options MountOptions   `json:"options"`
}

// MountOptions say how something is mounted.
type MountOptions struct {
	ReadOnly bool `json:"read_only"`
	NoExec   bool `json:"no_exec"`
	NoSUID   bool `json:"no_suid"`
	NoDev    bool `json:"no_dev"`
}

// With gives the mount with these options.
func (m Mount) With(options MountOptions) Mount { m.Options = options; return m }

// ReadOnly gives the mount read-only.
func (m Mount) ReadOnly() Mount { m.Options.ReadOnly = true; return m }

// Quota gives the mount of a directory volume with at most so many MiB.
func (m Mount) Quota(mib int) Mount {
	m.Source = maps.Clone(m.Source)
	m.Source["quota_mib"] = mib
	return m
}

// Create makes a volume; sizeMiB is a disk's, and 0 stands for the usual.
func (volumes) Create(ctx context.Context, name string, kind VolumeKind, sizeMiB int) (*VolumeDetail, error) {
	client, err := Connect(ctx)
	if err != nil {
		return nil, err
	}
	defer client.Close()
	return client.CreateVolume(ctx, name, kind, sizeMiB)
}

// Get gives one volume.
func (volumes) Get(ctx context.Context, name string) (*VolumeDetail, error) {
	client, err := Connect(ctx)
	if err != nil {
		return nil, err
	}
	defer client.Close()
	return client.Volume(ctx, name)
}

// List gives every volume, by name.
func (volumes) List(ctx context.Context) ([]VolumeDetail, error) {
	client, err := Connect(ctx)
	if err != nil {
		return nil, err
	}
	defer client.Close()
	return client.Volumes(ctx)
}

// Remove removes a volume; ErrVolumeInUse names the sandboxes.
func (volumes) Remove(ctx context.Context, name string) error {
	client, err := Connect(ctx)
	if err != nil {
		return err
	}
	defer client.Close()
	return client.RemoveVolume(ctx, name)
}

// Bind mounts a directory or file of this host.
func (volumes) Bind(source, target string) Mount {
	if absolute, err := filepath.Abs(source); err == nil {
		source = absolute
	}
	kind := "directory"
	if found, err := os.Stat(source); err == nil && !found.IsDir() {
		kind = "file"
	}
	return Mount{Target: target, Source: map[string]any{"kind": kind, "path": source}}
}

// Named mounts a named volume, which is made if it does not exist.
func (volumes) Named(name, target string) Mount {
	return Mount{Target: target, Source: map[string]any{"kind": "named", "name": name}}
}

// Tmpfs mounts memory of the guest; 0 stands for half of it.
func (volumes) Tmpfs(target string, sizeMiB int) Mount {
	source := map[string]any{"kind": "tmpfs"}
	if sizeMiB > 0 {
		source["size_mib"] = sizeMiB
	}
	return Mount{Target: target, Source: source}
}

// Disk mounts a disk image of this host: raw, with an ext4.
func (volumes) Disk(image, target string) Mount {
	if absolute, err := filepath.Abs(image); err == nil {
		image = absolute
	}
	return Mount{Target: target, Source: map[string]any{"kind": "disk", "path": image}}
}

// CreateVolume makes a volume; sizeMiB is a disk's, and 0 stands for the usual.
func (c *Client) CreateVolume(ctx context.Context, name string, kind VolumeKind, sizeMiB int) (*VolumeDetail, error) {
	if err := checkName(name); err != nil {
		return nil, err
	}
	request := struct {
		Name    string     `json:"name"`
		Kind    VolumeKind `json:"kind"`
		SizeMiB int        `json:"size_mib,omitempty"`
	}{name, kind, sizeMiB}
	var detail VolumeDetail
	if err := c.call(ctx, http.MethodPost, "/v1/volumes", request, &detail); err != nil {
		return nil, err
	}
	return &detail, nil
}

// Volume gives one volume.
func (c *Client) Volume(ctx context.Context, name string) (*VolumeDetail, error) {
	if err := checkName(name); err != nil {
		return nil, err
	}
	var detail VolumeDetail
	if err := c.call(ctx, http.MethodGet, "/v1/volumes/"+name, nil, &detail); err != nil {
		return nil, err
	}
	return &detail, nil
}

// Volumes gives every volume, by name.
func (c *Client) Volumes(ctx context.Context) ([]VolumeDetail, error) {
	var list struct {
		Volumes []VolumeDetail `json:"volumes"`
	}
	err := c.call(ctx, http.MethodGet, "/v1/volumes", nil, &list)
	return list.Volumes, err
}

// RemoveVolume removes a volume.
func (c *Client) RemoveVolume(ctx context.Context, name string) error {
	if err := checkName(name); err != nil {
		return err
	}
	return c.call(ctx, http.MethodDelete, "/v1/volumes/"+name, nil, nil)
}
