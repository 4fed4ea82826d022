package cli

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/hearth-serverless/hearth/registry"
)

func (a *app) image() *cobra.Command {
	c := &cobra.Command{
		Use: "image", Short: "Pull images, make them start faster, and see what they are made of", Args: subcommand,
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	c.AddCommand(a.pullImage(), a.listImages(), a.inspect(), a.accelerate(), a.profileImage(), a.showProfile())
	return c
}

// subcommand is the Args of a command that has only others below it.
func subcommand(c *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usagef("unknown command %q%s", args[0], suggestions(c, args[0]))
	}
	return nil
}

// registryOptions say how to get at registries, as nodeagent does.
type registryOptions struct {
	hostsDir, dockerConfig string
}

func (o *registryOptions) add(f *pflag.FlagSet) {
	f.StringVar(&o.hostsDir, "hosts-dir", "", "folder of hosts.toml files for registries, as containerd's config_path")
	f.StringVar(&o.dockerConfig, "docker-config", "", "Docker's config.json with credentials for registries (default: $DOCKER_CONFIG or ~/.docker)")
}

func (o *registryOptions) client() (*registry.Client, error) {
	c, err := registry.New(registry.Config{HostsDir: o.hostsDir, DockerConfig: o.dockerConfig})
	if err != nil {
		return nil, usageError{err}
	}
	return c, nil
}

// explainRegistry adds what the user can do about an error of a registry.
func explainRegistry(ctx context.Context, err error) error {
	if err == nil {
		return nil
	}
	next := ""
	switch {
	case errors.Is(err, registry.ErrUnauthorized):
		next = "; sign in with `docker login`, or name a config.json by --docker-config"
	case errors.Is(err, registry.ErrNotFound):
		next = "; is the reference right, and the image pushed?"
	}
	return interrupted(ctx, &spoken{text: err.Error() + next, err: err})
}

const inspectLong = `Shows an image's layers: how each is encoded, how large it is, and which siblings "hearth image accelerate" has attached.
What a layer unpacks to is known from its siblings only. Of an image for several platforms it is this machine's that is shown.`

func (a *app) inspect() *cobra.Command {
	var out format
	var o registryOptions
	c := &cobra.Command{
		Use: "inspect REF", Short: "Show an image's layers, their encodings, sizes and siblings", Long: inspectLong,
		Example: "  hearth image inspect 127.0.0.1:5000/hello:1\n  hearth image inspect REF -o json",
		Args:    takes(1, 1, "the image's REF"),
		RunE: func(c *cobra.Command, args []string) error {
			client, err := o.client()
			if err != nil {
				return err
			}
			defer client.Close()
			image, err := inspectImage(c.Context(), client, args[0])
			if err != nil {
				return explainRegistry(c.Context(), err)
			}
			if out == formatJSON {
				return a.printJSON(image)
			}
			return a.printImage(image)
		},
	}
	o.add(c.Flags())
	out.add(c.Flags())
	return c
}

type imageJSON struct {
	Image  string        `json:"image"`
	Digest digest.Digest `json:"digest"`
	Layers []layerJSON   `json:"layers"`
}

type layerJSON struct {
	Digest   digest.Digest `json:"digest"`
	DiffID   digest.Digest `json:"diff_id"`
	Encoding string        `json:"encoding"`
	Size     int64         `json:"size"`
	// Unpacked is the size of the tar; 0 if it is not known.
	Unpacked int64         `json:"unpacked,omitempty"`
	Siblings []siblingJSON `json:"siblings,omitempty"`
}

type siblingJSON struct {
	Encoding string        `json:"encoding"`
	Digest   digest.Digest `json:"digest"`
	Size     int64         `json:"size"`
	Ratio    float64       `json:"ratio"` // to the tar
}

func inspectImage(ctx context.Context, c *registry.Client, ref string) (*imageJSON, error) {
	img, err := c.Image(ctx, ref, "")
	if err != nil {
		return nil, err
	}
	siblings, err := c.Siblings(ctx, ref, img.Digest)
	if err != nil {
		return nil, err
	}
	out := &imageJSON{Image: ref, Digest: img.Digest}
	for _, l := range img.Layers {
		row := layerJSON{Digest: l.Digest, DiffID: l.DiffID, Encoding: encodingOf(l.MediaType), Size: l.Size}
		for _, s := range siblings {
			if s.Original == l.Digest && s.DiffID == l.DiffID {
				row.Unpacked = s.Bytes
				row.Siblings = append(row.Siblings, siblingJSON{s.Encoding, s.Digest, s.Size, float64(s.Size) / float64(s.Bytes)})
			}
		}
		out.Layers = append(out.Layers, row)
	}
	return out, nil
}

// encodingOf reads a layer's media type, which may lie: the node goes by the bytes.
func encodingOf(mediaType string) string {
	for _, e := range []string{"gzip", "zstd"} {
		if strings.HasSuffix(mediaType, e) {
			return e
		}
	}
	return "tar"
}

func (a *app) printImage(image *imageJSON) error {
	var encodings []string
	for _, l := range image.Layers {
		for _, s := range l.Siblings {
			if !slices.Contains(encodings, s.Encoding) {
				encodings = append(encodings, s.Encoding)
			}
		}
	}
	slices.Sort(encodings)
	head := []string{"LAYER", "ENCODING", "SIZE", "UNPACKED", "RATIO"}
	for _, e := range encodings {
		head = append(head, strings.ToUpper(e), "RATIO")
	}
	rows := [][]string{head}
	total := layerJSON{Encoding: "-"}
	sums := make([]siblingJSON, len(encodings))
	for _, l := range image.Layers {
		cells := make([]siblingJSON, len(encodings))
		for _, s := range l.Siblings {
			i := slices.Index(encodings, s.Encoding)
			cells[i] = s
			sums[i].Size += s.Size
		}
		rows = append(rows, layerRow(l.Digest.Encoded()[:12], l, cells))
		total.Size, total.Unpacked = total.Size+l.Size, total.Unpacked+l.Unpacked
	}
	if len(image.Layers) > 1 {
		rows = append(rows, layerRow("total", total, sums))
	}
	if err := a.printf("%s  %s\n", image.Image, image.Digest); err != nil {
		return err
	}
	return a.table(rows)
}

func layerRow(name string, l layerJSON, siblings []siblingJSON) []string {
	row := []string{name, l.Encoding, megabytes(l.Size), megabytes(l.Unpacked), percent(l.Size, l.Unpacked)}
	for _, s := range siblings {
		row = append(row, megabytes(s.Size), percent(s.Size, l.Unpacked))
	}
	return row
}

func megabytes(n int64) string {
	switch {
	case n == 0:
		return "-"
	case n < 1e6:
		return fmt.Sprintf("%.1f kB", float64(n)/1e3)
	}
	return fmt.Sprintf("%.1f MB", float64(n)/1e6)
}

func percent(n, of int64) string {
	if n == 0 || of == 0 {
		return "-"
	}
	return fmt.Sprintf("%.0f %%", 100*float64(n)/float64(of))
}
