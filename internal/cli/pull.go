package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/api/v1alpha1/hearthv1connect"
	"github.com/hearth-serverless/hearth/internal/daemon"
	"github.com/hearth-serverless/hearth/internal/stack"
)

func (a *app) images() hearthv1connect.ImageServiceClient {
	return hearthv1connect.NewImageServiceClient(daemon.UnixClient(filepath.Join(a.run, stack.NodeSocket)), baseURL)
}

const pullLong = `Pulls an image as the kubelet does, through the node's containerd, and shows how far it is: bytes and layers, as the
snapshotter sees them. It prints the image's id. With -o json there is one line of JSON at each change, the last with the id.`

func (a *app) pullImage() *cobra.Command {
	var out format
	c := &cobra.Command{
		Annotations: map[string]string{onMachine: "the kubelet pulls a cluster's images; `hearth pool apply --image` has them on nodes ahead"},
		Use:         "pull REF", Short: "Pull an image onto this node", Long: pullLong, Args: takes(1, 1, "the image's REF"),
		Example: "  hearth image pull 127.0.0.1:5000/hello:1\n  hearth image pull REF -o json",
		RunE: func(c *cobra.Command, args []string) error {
			stream, err := a.images().PullImage(c.Context(), connect.NewRequest(&hearthv1.PullImageRequest{Image: args[0]}))
			if err != nil {
				return a.explainImage(err, "pull "+args[0])
			}
			defer stream.Close()
			show := a.showBar(args[0])
			if out == formatJSON {
				show = a.showEvent
			}
			for stream.Receive() {
				if err := show(stream.Msg()); err != nil {
					return err
				}
			}
			if err := stream.Err(); err != nil {
				return a.explainImage(err, "pull "+args[0])
			}
			return nil
		},
	}
	out.add(c.Flags())
	return c
}

// explainImage is explain, without the advice that is about Functions.
func (a *app) explainImage(err error, doing string) error {
	var rpc *connect.Error
	if !errors.As(err, &rpc) || rpc.Code() == connect.CodeUnavailable || rpc.Code() == connect.CodeCanceled {
		return a.explain(err, doing)
	}
	return &spoken{text: doing + ": " + rpc.Message(), err: err}
}

// showEvent prints one line of JSON.
func (a *app) showEvent(m *hearthv1.PullImageResponse) error {
	data, err := json.Marshal(message(m))
	if err != nil {
		return fmt.Errorf("write JSON: %w", err)
	}
	return a.println(string(data))
}

// showBar draws a bar on a terminal's standard error; the image's id goes to standard output.
func (a *app) showBar(ref string) func(*hearthv1.PullImageResponse) error {
	begun, terminal := time.Now(), isTerminal(a.err)
	return func(m *hearthv1.PullImageResponse) error {
		if terminal {
			_, _ = fmt.Fprintf(a.err, "\r\x1b[K%s", pullBar(m, time.Since(begun)))
		}
		if m.GetId() == "" {
			return nil
		}
		if terminal {
			_, _ = fmt.Fprint(a.err, "\r\x1b[K")
		}
		a.note("%s: %s", ref, summary(m, time.Since(begun)))
		return a.println(m.GetId())
	}
}

// settled counts the layers of which nothing more is to come, and all.
func settled(m *hearthv1.PullImageResponse) (done, all int) {
	for _, l := range m.GetLayers() {
		if s := l.GetState(); s == hearthv1.LayerState_LAYER_STATE_READY || s == hearthv1.LayerState_LAYER_STATE_PRESENT {
			done++
		}
	}
	return done, len(m.GetLayers())
}

// pullBar is a pull in one line of a terminal.
func pullBar(m *hearthv1.PullImageResponse, elapsed time.Duration) string {
	done, all := settled(m)
	if all == 0 {
		return fmt.Sprintf("reading the manifest  %.1f s", elapsed.Seconds())
	}
	line := bar(fmt.Sprintf("%d of %s", done, plural(all, "layer")), m.GetBytesFetched(), m.GetBytesTotal(), elapsed)
	return fmt.Sprintf("%s  %.1f s", line, elapsed.Seconds())
}

// summary says how a pull went.
func summary(m *hearthv1.PullImageResponse, elapsed time.Duration) string {
	if m.GetBytesTotal() == 0 {
		return fmt.Sprintf("was there, %.1f s", elapsed.Seconds())
	}
	_, all := settled(m)
	text := fmt.Sprintf("%s fetched for %s, %s, %.1f s", megabytes(m.GetBytesFetched()), plural(all, "layer"), rate(m.GetBytesFetched(), elapsed), elapsed.Seconds())
	for _, l := range m.GetLayers() {
		if l.GetState() == hearthv1.LayerState_LAYER_STATE_LEFT {
			return text + "; layers were left to containerd, see the log of nodeagent and `hearth node doctor`"
		}
	}
	return text
}

func (a *app) listImages() *cobra.Command {
	var out format
	c := &cobra.Command{
		Annotations: map[string]string{onMachine: "`kubectl get nodes -o yaml` tells a cluster's images"},
		Use:         "ls", Short: "List the images on this node", Args: takes(0, 0, ""),
		RunE: func(c *cobra.Command, _ []string) error {
			resp, err := a.images().ListImages(c.Context(), connect.NewRequest(&hearthv1.ListImagesRequest{}))
			if err != nil {
				return a.explain(err, "list images")
			}
			if out == formatJSON {
				return a.printJSON(messages(resp.Msg.GetImages()))
			}
			rows := [][]string{{"IMAGE", "ID", "COMPRESSED", "PINNED"}}
			for _, i := range resp.Msg.GetImages() {
				id := strings.TrimPrefix(i.GetId(), "sha256:")
				for _, name := range i.GetNames() {
					rows = append(rows, []string{name, id[:min(12, len(id))], megabytes(i.GetBytes()), yesNo(i.GetPinned())})
				}
			}
			return a.table(rows)
		},
	}
	out.add(c.Flags())
	return c
}
