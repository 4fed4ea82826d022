package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/api/v1alpha1/hearthv1connect"
	"github.com/hearth-serverless/hearth/internal/daemon"
	"github.com/hearth-serverless/hearth/internal/stack"
	"github.com/hearth-serverless/hearth/prefetch"
	"github.com/hearth-serverless/hearth/registry"
)

// builtOn is the node of a profile that was made on purpose.
const builtOn = "build"

// sizesTime bounds what is asked of a registry for sizes alone.
const sizesTime = 5 * time.Second

// nodeOptions say which nodeagent is meant.
type nodeOptions struct{ socket string }

func (o *nodeOptions) add(f *pflag.FlagSet) {
	f.StringVar(&o.socket, "node-socket", "", "nodeagent's socket (default: the one in --run; on a node of a cluster /run/hearth/node.sock)")
}

func (a *app) profiles(o nodeOptions) hearthv1connect.ProfileServiceClient {
	return hearthv1connect.NewProfileServiceClient(daemon.UnixClient(cmp.Or(o.socket, filepath.Join(a.run, stack.NodeSocket))), baseURL)
}

const profileLong = `Starts an image several times on this machine, one start after another, and learns what the starts read: which layers, files and
ranges, in which order. That is the image's profile. It is pushed beside the image, which itself stays as it is, and every node that
pulls the image from then on has what starts read in memory before they ask for it, from their first start on.

The starts are of instances of their own that serve nobody. A start is over when the image listens, or with --request when that path
is answered. Pushing wants the right to push to the image's repository.

On a cluster nodes learn on their own, from the starts that there are. To have a profile before the first of them, make it where images are
built: on a machine with "hearth up".`

const profileExample = `  hearth image profile 127.0.0.1:5000/hello:1
  hearth image profile REF --request /healthz --starts 5
  hearth image profile REF --no-push -o json`

// profiledJSON is what profile prints.
type profiledJSON struct {
	Image   string        `json:"image"`
	Digest  digest.Digest `json:"digest,omitempty"` // of the manifest; if it was pushed
	Ready   []float64     `json:"ready_seconds"`    // of each start
	Starts  int           `json:"starts"`           // that the profile is made of
	Lost    uint64        `json:"lost_events"`
	Bytes   int64         `json:"bytes"` // that it names
	Files   int           `json:"files"`
	Encoded int           `json:"encoded_bytes"`
	Pushed  bool          `json:"pushed"`
}

func (a *app) profileImage() *cobra.Command {
	var out format
	var o registryOptions
	var node nodeOptions
	var noPush bool
	req := &hearthv1.ProfileImageRequest{}
	c := &cobra.Command{
		Annotations: map[string]string{onMachine: "nodes of a cluster learn from the starts that there are; make a profile where images are built, on a machine with `hearth up`"},
		Use:         "profile REF", Short: "Learn what an image's starts read, for all nodes", Long: profileLong, Example: profileExample,
		Args: takes(1, 1, "the image's REF"),
		RunE: func(c *cobra.Command, args []string) error {
			if req.GetStarts() < 1 {
				return usagef("--starts %d: one at least", req.GetStarts())
			}
			client, err := o.client()
			if err != nil {
				return err
			}
			defer client.Close()
			req.Image = args[0]
			return a.runProfile(c.Context(), client, a.profiles(node), req, !noPush, out)
		},
	}
	f := c.Flags()
	f.Int32Var(&req.Starts, "starts", 3, "how many starts to record; more tell apart what all of them need and what one did")
	f.Int32Var(&req.Port, "port", 8080, "where the image listens, given to it as $PORT")
	f.StringVar(&req.RequestPath, "request", "", "path to ask for after each start, as the first request would (default: none)")
	f.StringToStringVarP(&req.Env, "env", "e", nil, "environment for the starts, as NAME=VALUE; may be repeated")
	f.BoolVar(&noPush, "no-push", false, "leave the profile on this node")
	node.add(f)
	o.add(f)
	out.add(f)
	return c
}

func (a *app) runProfile(ctx context.Context, client *registry.Client, node hearthv1connect.ProfileServiceClient, req *hearthv1.ProfileImageRequest, push bool, out format) error {
	result := profiledJSON{Image: req.GetImage(), Ready: []float64{}}
	made, err := a.record(ctx, node, req, &result)
	if err != nil {
		return a.explainProfile(err, "profile "+req.GetImage(), "is the reference right, and the image pushed?")
	}
	p, err := prefetch.Parse(made.GetEncoded())
	if err != nil {
		return fmt.Errorf("profile %s: nodeagent answers with something else: %w; is it of the version of this program?", req.GetImage(), err)
	}
	result.Starts, result.Lost, result.Bytes, result.Files, result.Encoded = p.Starts, p.Lost, p.Bytes(), len(p.Files), len(made.GetEncoded())
	if push {
		if result.Digest, err = pushProfile(ctx, client, req.GetImage(), made, p.Starts); err != nil {
			return explainRegistry(ctx, fmt.Errorf("the profile is made and on this node, but not pushed: %w", err))
		}
		result.Pushed = true
	}
	if out == formatJSON {
		return a.printJSON(result)
	}
	where := "it stays on this node"
	if push {
		where = "pushed beside the image"
	}
	lost := ""
	if p.Lost > 0 {
		lost = fmt.Sprintf(", %d events lost", p.Lost)
	}
	return a.printf("%s: starts read %s of %s%s (%s recorded); %s\n", req.GetImage(), megabytes(p.Bytes()), plural(len(p.Files), "file"), lost, plural(p.Starts, "start"), where)
}

// record has the node make the starts.
func (a *app) record(ctx context.Context, node hearthv1connect.ProfileServiceClient, req *hearthv1.ProfileImageRequest, result *profiledJSON) (*hearthv1.ImageProfile, error) {
	stream, err := node.ProfileImage(ctx, connect.NewRequest(req))
	if err != nil {
		return nil, err
	}
	defer stream.Close()
	var made *hearthv1.ImageProfile
	for stream.Receive() {
		m := stream.Msg()
		if m.GetReadyTime() != nil {
			took := m.GetReadyTime().AsDuration()
			result.Ready = append(result.Ready, took.Seconds())
			a.note("start %d of %d: ready after %s", m.GetStart(), req.GetStarts(), took.Round(time.Millisecond))
		}
		if m.GetProfile() != nil {
			made = m.GetProfile()
		}
	}
	if err := stream.Err(); err != nil {
		return nil, err
	}
	if made == nil {
		return nil, errors.New("nodeagent ended without a profile")
	}
	return made, nil
}

// pushProfile attaches a profile, if the reference still names the image that was started.
func pushProfile(ctx context.Context, client *registry.Client, ref string, made *hearthv1.ImageProfile, starts int) (digest.Digest, error) {
	img, err := client.Image(ctx, ref, "")
	if err != nil {
		return "", err
	}
	if img.ChainID().String() != made.GetChainId() {
		return "", fmt.Errorf("%s names another image in the registry than on this node; `hearth image pull %s` brings that here", ref, ref)
	}
	return img.Digest, client.AttachProfile(ctx, img, registry.Profile{
		Data: made.GetEncoded(), Created: time.Now(), Starts: starts, Platform: "linux/" + runtime.GOARCH, Node: builtOn,
	})
}

// explainProfile is explainImage with what to do next; missing is that for what is not there.
func (a *app) explainProfile(err error, doing, missing string) error {
	next := map[connect.Code]string{
		connect.CodeNotFound:           missing,
		connect.CodeFailedPrecondition: "nodeagent's log says what it cannot do, and `hearth node doctor` looks at the node",
		connect.CodeUnimplemented:      "nodeagent is older than this program",
	}[connect.CodeOf(err)]
	said := a.explainImage(err, doing)
	if next == "" {
		return said
	}
	return &spoken{text: said.Error() + "; " + next, err: err}
}

const showProfileLong = `Shows what starts of an image read, as its profile says: for each layer its files, in the order in which they are first needed, how much
of them before the start was ready and how much after, and in how many of the recorded starts. The profile is that beside the image
in its registry, the newest, or with --node what this node knows.`

// profileJSON is what show-profile prints.
type profileJSON struct {
	Image    string             `json:"image"`
	From     string             `json:"from"` // registry or node
	Node     string             `json:"node,omitempty"`
	Created  *time.Time         `json:"created,omitempty"`
	Platform string             `json:"platform,omitempty"`
	Starts   int                `json:"starts"`
	Lost     uint64             `json:"lost_events"`
	Bytes    int64              `json:"bytes"`       // that it names
	Size     int64              `json:"image_bytes"` // of the image's layers, compressed
	Layers   []profileLayerJSON `json:"layers"`
}

type profileLayerJSON struct {
	DiffID  digest.Digest     `json:"diff_id"`
	Foreign bool              `json:"foreign,omitempty"` // the image does not have it
	Before  int64             `json:"bytes_before_ready"`
	After   int64             `json:"bytes_after_ready"`
	Files   []profileFileJSON `json:"files"`
}

type profileFileJSON struct {
	Path   string             `json:"path"`
	Before int64              `json:"bytes_before_ready"`
	After  int64              `json:"bytes_after_ready"`
	Seen   float64            `json:"seen"` // most of its ranges', as a part of the starts
	Ranges []profileRangeJSON `json:"ranges"`
}

type profileRangeJSON struct {
	Offset int64   `json:"offset"`
	Length int64   `json:"length"`
	Seen   float64 `json:"seen"`
	After  bool    `json:"after_ready,omitempty"`
}

func (a *app) showProfile() *cobra.Command {
	var out format
	var o registryOptions
	var node nodeOptions
	var fromNode bool
	c := &cobra.Command{
		Use: "show-profile REF", Short: "Show what an image's starts read", Long: showProfileLong, Args: takes(1, 1, "the image's REF"),
		Example: "  hearth image show-profile 127.0.0.1:5000/hello:1\n  hearth image show-profile REF --node\n  hearth image show-profile REF -o json",
		RunE: func(c *cobra.Command, args []string) error {
			client, err := o.client()
			if err != nil {
				return err
			}
			defer client.Close()
			shown, err := a.findProfile(c.Context(), client, node, fromNode, args[0])
			if err != nil {
				return err
			}
			if out == formatJSON {
				return a.printJSON(shown)
			}
			return a.printProfile(shown)
		},
	}
	c.Flags().BoolVar(&fromNode, "node", false, "what this node knows, learnt here or from the registry")
	node.add(c.Flags())
	o.add(c.Flags())
	out.add(c.Flags())
	return c
}

func (a *app) findProfile(ctx context.Context, client *registry.Client, node nodeOptions, fromNode bool, ref string) (*profileJSON, error) {
	if fromNode {
		resp, err := a.profiles(node).GetProfile(ctx, connect.NewRequest(&hearthv1.GetProfileRequest{Image: ref}))
		if err != nil {
			return nil, a.explainProfile(err, "show profile of "+ref, fmt.Sprintf("start a function of it here, or `hearth image profile %s`", ref))
		}
		ctx, cancel := context.WithTimeout(ctx, sizesTime)
		defer cancel()
		img, err := client.Image(ctx, ref, "")
		if err != nil {
			img = nil // it was for the sizes only
		}
		return describe(ref, img, resp.Msg.GetProfile().GetEncoded(), profileJSON{From: "node"})
	}
	img, err := client.Image(ctx, ref, "")
	if err != nil {
		return nil, explainRegistry(ctx, err)
	}
	found, err := client.Profiles(ctx, ref, img.Digest)
	if err != nil {
		return nil, explainRegistry(ctx, err)
	}
	if len(found) == 0 {
		return nil, fmt.Errorf("%s has no profile in its registry; `hearth image profile %s` makes one, --node shows what this node knows", ref, ref)
	}
	p := found[0]
	return describe(ref, img, p.Data, profileJSON{From: "registry", Node: p.Node, Created: &p.Created, Platform: p.Platform})
}

// describe lists a profile by the image's layers, lowest first; img is nil if it is not known.
func describe(ref string, img *registry.Image, encoded []byte, out profileJSON) (*profileJSON, error) {
	p, err := prefetch.Parse(encoded)
	if err != nil {
		return nil, fmt.Errorf("profile of %s: %w", ref, err)
	}
	out.Image, out.Starts, out.Lost, out.Bytes, out.Layers = ref, p.Starts, p.Lost, p.Bytes(), []profileLayerJSON{}
	order := p.Layers()
	if img != nil {
		for _, l := range img.Layers {
			out.Size += l.Size
		}
		at := func(d digest.Digest) int {
			i := slices.IndexFunc(img.Layers, func(l registry.Layer) bool { return l.DiffID == d })
			if i < 0 {
				return len(img.Layers)
			}
			return i
		}
		slices.SortStableFunc(order, func(x, y digest.Digest) int { return cmp.Compare(at(x), at(y)) })
	}
	for _, d := range order {
		layer := profileLayerJSON{DiffID: d, Files: []profileFileJSON{}}
		layer.Foreign = img != nil && !slices.ContainsFunc(img.Layers, func(l registry.Layer) bool { return l.DiffID == d })
		for _, f := range p.Files {
			if f.Layer == d {
				file := describeFile(f, p.Weight)
				layer.Before, layer.After, layer.Files = layer.Before+file.Before, layer.After+file.After, append(layer.Files, file)
			}
		}
		out.Layers = append(out.Layers, layer)
	}
	return &out, nil
}

func describeFile(f prefetch.File, weight float64) profileFileJSON {
	file := profileFileJSON{Path: f.Path}
	for _, r := range f.Ranges {
		seen := min(r.Seen/weight, 1)
		file.Ranges = append(file.Ranges, profileRangeJSON{r.Offset, r.Length, seen, r.AfterReady})
		file.Seen = max(file.Seen, seen)
		if r.AfterReady {
			file.After += r.Length
		} else {
			file.Before += r.Length
		}
	}
	return file
}

func (a *app) printProfile(p *profileJSON) error {
	head := fmt.Sprintf("%s, from the %s", p.Image, p.From)
	if p.Created != nil {
		head += fmt.Sprintf(": made on %s, %s ago, for %s", p.Node, age(*p.Created, time.Now()), p.Platform)
	}
	if err := a.printf("%s\n%s recorded, %d events lost\n", head, plural(p.Starts, "start"), p.Lost); err != nil {
		return err
	}
	share := ""
	if p.Size > 0 {
		share = fmt.Sprintf(" of an image of %s, compressed", megabytes(p.Size))
	}
	if err := a.printf("%s are read%s\n", megabytes(p.Bytes), share); err != nil {
		return err
	}
	for _, l := range p.Layers {
		note := ""
		if l.Foreign {
			note = " (not of this image)"
		}
		if err := a.printf("\nlayer %s%s: %s before ready, %s after\n", l.DiffID, note, megabytes(l.Before), megabytes(l.After)); err != nil {
			return err
		}
		rows := [][]string{{"FILE", "RANGES", "BEFORE READY", "AFTER", "SEEN"}}
		for _, f := range l.Files {
			rows = append(rows, []string{"/" + f.Path, strconv.Itoa(len(f.Ranges)), megabytes(f.Before), megabytes(f.After), percent(int64(1000*f.Seen), 1000)})
		}
		if err := a.table(rows); err != nil {
			return err
		}
	}
	return nil
}

const cacheLong = `Shows what reading ahead was worth on this node since nodeagent's start, for each image: how much of what its profile names was in memory
already (hits), how much was read ahead, and of that, as far as starts were recorded, what they needed and what was in vain; and the time
that it took, beside the starts. Below is how much is kept in memory because several images need it (nodeagent's --prefetch-keep).`

func (a *app) nodeCache() *cobra.Command {
	var out format
	var node nodeOptions
	c := &cobra.Command{
		Annotations: map[string]string{onMachine: "run it on the node itself, with --node-socket; the metrics hearth_prefetch_* have a cluster's sums"},
		Use:         "cache", Short: "Show what was read ahead for starts, and what it was worth", Long: cacheLong, Args: takes(0, 0, ""),
		Example: "  hearth node cache\n  sudo hearth node cache --node-socket /run/hearth/node.sock -o json",
		RunE: func(c *cobra.Command, _ []string) error {
			resp, err := a.profiles(node).GetCacheUsage(c.Context(), connect.NewRequest(&hearthv1.GetCacheUsageRequest{}))
			if err != nil {
				return a.explainProfile(err, "show the node's cache", "")
			}
			if out == formatJSON {
				return a.printJSON(message(resp.Msg))
			}
			rows := [][]string{{"IMAGE", "STARTS", "HITS", "READ AHEAD", "USED", "IN VAIN", "TIME"}}
			for _, u := range resp.Msg.GetImages() {
				rows = append(rows, []string{
					cmp.Or(u.GetImage(), shortDigest(u.GetChainId())), strconv.Itoa(int(u.GetStarts())), megabytes(u.GetHitBytes()), megabytes(u.GetAheadBytes()),
					megabytes(u.GetUsedBytes()), megabytes(u.GetVainBytes()), u.GetTime().AsDuration().Round(time.Millisecond).String(),
				})
			}
			if err := a.table(rows); err != nil {
				return err
			}
			return a.printf("\n%s kept in memory, because several images need them\n", megabytes(resp.Msg.GetKeptBytes()))
		},
	}
	node.add(c.Flags())
	out.add(c.Flags())
	return c
}

// shortDigest is enough of one to tell it from others.
func shortDigest(d string) string {
	algorithm, hex, _ := strings.Cut(d, ":")
	return algorithm + ":" + hex[:min(12, len(hex))]
}
