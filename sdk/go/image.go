package msb

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"iter"
	"net/http"
	"net/url"
	"os"
	"time"
)

// Image holds the calls about images of the service of this environment: msb.Image.List(ctx).
var Image images

type images struct{}

// Load loads a docker or OCI archive.
func (images) Load(ctx context.Context, archive string) ([]ImageHandle, error) {
	file, err := os.Open(archive)
	if err != nil {
		code := Code("path_not_found")
		if errors.Is(err, os.ErrPermission) {
			code = "permission_denied"
		}
		return nil, failure(code, err, "%v", err)
	}
	defer file.Close()
	client, err := Connect(ctx)
	if err != nil {
		return nil, err
	}
	defer client.Close()
	return client.LoadImage(ctx, file)
}

// List gives every image, newest first.
func (images) List(ctx context.Context) ([]ImageHandle, error) {
	client, err := Connect(ctx)
	if err != nil {
		return nil, err
	}
	defer client.Close()
	return client.Images(ctx)
}

// Get gives one image.
func (images) Get(ctx context.Context, reference string) (*ImageHandle, error) {
	detail, err := Image.Inspect(ctx, reference)
	if err != nil {
		return nil, err
	}
	return &detail.ImageHandle, nil
}

// Inspect gives everything about one image.
func (images) Inspect(ctx context.Context, reference string) (*ImageDetail, error) {
	client, err := Connect(ctx)
	if err != nil {
		return nil, err
	}
	defer client.Close()
	return client.InspectImage(ctx, reference)
}

// Remove removes an image; force untags it even where sandboxes use it.
func (images) Remove(ctx context.Context, reference string, force bool) error {
	client, err := Connect(ctx)
	if err != nil {
		return err
	}
	defer client.Close()
	return client.RemoveImage(ctx, reference, force)
}

// Pull pulls an image from its registry.
func (images) Pull(ctx context.Context, reference string) (*ImageHandle, error) {
	client, err := Connect(ctx)
	if err != nil {
		return nil, err
	}
	defer client.Close()
	for event, err := range client.PullImage(ctx, PullOptions{Reference: reference}) {
		if err != nil {
			return nil, err
		}
		if event.Image != nil {
			return event.Image, nil
		}
	}
	return nil, failure("daemon_unavailable", nil, "the pull ended without an answer")
}

// Save writes an archive of images to a file. One that breaks off leaves no file.
func (images) Save(ctx context.Context, references []string, path string, options SaveOptions) (err error) {
	client, err := Connect(ctx)
	if err != nil {
		return err
	}
	defer client.Close()
	unfinished := path + ".part"
	file, err := os.Create(unfinished)
	if err != nil {
		return failure("permission_denied", err, "%v", err)
	}
	defer func() {
		if err != nil {
			os.Remove(unfinished)
		}
	}()
	if err = client.SaveImages(ctx, references, file, options); err != nil {
		file.Close()
		return err
	}
	if err = file.Close(); err != nil {
		return failure("disk_full", err, "%v", err)
	}
	return os.Rename(unfinished, path)
}

// Prune removes what no sandbox, snapshot, pin or pull needs.
func (images) Prune(ctx context.Context, options PruneOptions) (*ImagePruneReport, error) {
	client, err := Connect(ctx)
	if err != nil {
		return nil, err
	}
	defer client.Close()
	return client.PruneImages(ctx, options)
}

// PullOptions say which image is pulled.
type PullOptions struct {
	// Reference is [registry/]name[:tag|@digest].
	Reference string `json:"reference"`
	// Platform is as linux/amd64; the host's if empty.
	Platform string `json:"platform,omitempty"`
}

// SaveOptions say how images are saved.
type SaveOptions struct {
	// Format is docker, which is what an empty one means, or oci.
	Format string
}

// PruneOptions say what a prune may take.
type PruneOptions struct {
	// DryRun changes nothing.
	DryRun bool
	// All takes pinned images too.
	All bool
	// OlderThan takes only images that were not used for so long.
	OlderThan time.Duration
	// KeepBytes ends the prune when no more than this stays; nil: there is no such end.
	KeepBytes *uint64
	// Labels takes only images with all of them: KEY=VALUE, or KEY for any value.
	Labels []string
}

// PullImage pulls an image and tells how far it is. The last event is done; a failure ends the iteration with its error.
func (c *Client) PullImage(ctx context.Context, options PullOptions) iter.Seq2[PullEvent, error] {
	type pullEvent struct {
		PullEvent
		Error apiError `json:"error"`
	}
	return func(yield func(PullEvent, error) bool) {
		text, err := json.Marshal(options)
		if err != nil {
			yield(PullEvent{}, failure("invalid_request", err, "%v", err))
			return
		}
		body := bytes.NewReader(text)
		for event, err := range lines[pullEvent](ctx, c, http.MethodPost, "/v1/images/pull", body, "application/json") {
			if err == nil && event.Type == "error" {
				err = event.Error.typed()
			}
			if !yield(event.PullEvent, err) || err != nil || event.Type == "done" {
				return
			}
		}
	}
}

// SaveImages writes an archive of images. One that breaks off is not whole and gives an error.
func (c *Client) SaveImages(ctx context.Context, references []string, archive io.Writer, options SaveOptions) error {
	format := options.Format
	if format == "" {
		format = "docker"
	}
	text, err := json.Marshal(map[string]any{"references": references, "format": format})
	if err != nil {
		return failure("invalid_request", err, "%v", err)
	}
	response, err := c.send(ctx, http.MethodPost, "/v1/images/save", bytes.NewReader(text), "application/json")
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if _, err := io.Copy(archive, response.Body); err != nil {
		return lost(ctx, err)
	}
	return nil
}

// PruneImages removes what nothing needs.
func (c *Client) PruneImages(ctx context.Context, options PruneOptions) (*ImagePruneReport, error) {
	request := map[string]any{"dry_run": options.DryRun, "all": options.All}
	if options.OlderThan > 0 {
		request["older_than_ms"] = options.OlderThan.Milliseconds()
	}
	if options.KeepBytes != nil {
		request["keep_bytes"] = *options.KeepBytes
	}
	if len(options.Labels) > 0 {
		request["labels"] = options.Labels
	}
	var report ImagePruneReport
	if err := c.call(ctx, http.MethodPost, "/v1/images/prune", request, &report); err != nil {
		return nil, err
	}
	return &report, nil
}

// LoadImage loads an archive (docker or OCI, also compressed) into the store.
func (c *Client) LoadImage(ctx context.Context, archive io.Reader) ([]ImageHandle, error) {
	type loadEvent struct {
		Type   string        `json:"type"`
		Images []ImageHandle `json:"images"`
		Error  apiError      `json:"error"`
	}
	// The reader is hidden behind its interface, so that nothing but us closes it.
	body := struct{ io.Reader }{archive}
	for event, err := range lines[loadEvent](ctx, c, http.MethodPost, "/v1/images/load", body, "application/x-tar") {
		switch {
		case err != nil:
			return nil, err
		case event.Type == "done":
			return event.Images, nil
		case event.Type == "error":
			return nil, event.Error.typed()
		}
	}
	return nil, failure("daemon_unavailable", nil, "the load ended without an answer")
}

// Images gives every image, newest first.
func (c *Client) Images(ctx context.Context) ([]ImageHandle, error) {
	var list struct {
		Images []ImageHandle `json:"images"`
	}
	err := c.call(ctx, http.MethodGet, "/v1/images", nil, &list)
	return list.Images, err
}

// InspectImage gives everything about one image.
func (c *Client) InspectImage(ctx context.Context, reference string) (*ImageDetail, error) {
	var detail ImageDetail
	path := withQuery("/v1/image", url.Values{"reference": {reference}})
	if err := c.call(ctx, http.MethodGet, path, nil, &detail); err != nil {
		return nil, err
	}
	return &detail, nil
}

// RemoveImage removes an image.
func (c *Client) RemoveImage(ctx context.Context, reference string, force bool) error {
	query := forced(force)
	query.Set("reference", reference)
	return c.call(ctx, http.MethodDelete, withQuery("/v1/image", query), nil, nil)
}
