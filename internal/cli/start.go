package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/internal/waterfall"
)

type startOptions struct {
	trace, cold bool
	path        string
	timeout     time.Duration
	out         format
}

// startJSON is what start -o json prints.
type startJSON struct {
	Function    string            `json:"function"`
	Cold        bool              `json:"cold"`
	FirstByteMS float64           `json:"first_byte_ms"` // since the call for an Instance
	Instance    json.RawMessage   `json:"instance"`
	Phases      []json.RawMessage `json:"phases"`
}

const startLong = `Starts a fresh instance of a function, and says how long it takes from the call for it to the first byte of its first answer.
--cold first ends all instances and removes the image from the node. --trace shows the phases; they overlap: a layer is unpacked
while it is fetched. "busy" is the time that a phase worked. The instance then serves, until nobody needs it.`

func (a *app) start() *cobra.Command {
	o := &startOptions{}
	c := &cobra.Command{
		Use: "start NAME", Short: "Start an instance and show where the time goes", Long: startLong, Args: takes(1, 1, "the function's NAME"),
		Annotations: map[string]string{onMachine: "it asks an instance itself; a cluster's starts are measured by bin/bench k8s-start"},
		Example:     "  hearth start hello --trace\n  hearth start hello --trace --cold\n  hearth start hello -o json", ValidArgsFunction: a.completeFunction,
		RunE: func(c *cobra.Command, args []string) error { return a.runStart(c.Context(), args[0], o) },
	}
	c.Flags().BoolVar(&o.trace, "trace", false, "show the phases of the start")
	c.Flags().BoolVar(&o.cold, "cold", false, "first end all instances and remove the image, so that it has to be pulled")
	c.Flags().StringVar(&o.path, "path", "/", "path of the first request")
	c.Flags().DurationVar(&o.timeout, "timeout", 5*time.Minute, "give up after this time")
	o.out.add(c.Flags())
	return c
}

func (a *app) runStart(ctx context.Context, name string, o *startOptions) error {
	ctx, cancel := context.WithTimeout(ctx, o.timeout)
	defer cancel()
	if o.cold {
		_, err := a.machine().allocation().Release(ctx, connect.NewRequest(&hearthv1.ReleaseRequest{Function: name, Wait: true, ForgetImage: true}))
		if err != nil {
			return a.explain(err, "make "+name+" cold")
		}
	}
	deadline, _ := ctx.Deadline()
	start := time.Now()
	resp, err := a.machine().allocation().Allocate(ctx, connect.NewRequest(&hearthv1.AllocateRequest{Function: name, Deadline: timestamppb.New(deadline)}))
	if err != nil {
		return a.explain(err, "start "+name)
	}
	instance := resp.Msg.GetInstance()
	asked := time.Now()
	if err := firstByte(ctx, instance.GetAddress(), o.path); err != nil {
		return interrupted(ctx, fmt.Errorf("first request to %s: %w; see `hearth logs %s`", instance.GetId(), err, name))
	}
	end := time.Now()
	phases := append(resp.Msg.GetPhases(), &hearthv1.Phase{
		Name: "first_byte", Offset: durationpb.New(asked.Sub(start)), Duration: durationpb.New(end.Sub(asked)),
	})
	return a.printStart(name, o, instance, phases, end.Sub(start))
}

func (a *app) printStart(name string, o *startOptions, instance *hearthv1.Instance, phases []*hearthv1.Phase, took time.Duration) error {
	ms := float64(took) / float64(time.Millisecond)
	if o.out == formatJSON {
		return a.printJSON(startJSON{name, o.cold, ms, message(instance), messages(phases)})
	}
	if err := a.printf("%s serves at %s: %.1f ms to the first byte\n", instance.GetId(), instance.GetAddress(), ms); err != nil || !o.trace {
		return err
	}
	chart := waterfall.Chart{}
	for _, p := range phases {
		chart.Phases = append(chart.Phases, waterfall.Phase{
			Name: p.GetName(), Offset: p.GetOffset().AsDuration(), Duration: p.GetDuration().AsDuration(), Busy: p.GetBusy().AsDuration(),
		})
	}
	return chart.Write(a.out)
}

// firstByte asks the Instance itself, not the gateway, and reads the answer's first byte; an answer of any status is one.
func firstByte(ctx context.Context, address, path string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, functionPath(address, path), nil)
	if err != nil {
		return err
	}
	client := &http.Client{Transport: &http.Transport{}} // no proxy, no connection that was open before
	defer client.CloseIdleConnections()
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if _, err := io.ReadFull(resp.Body, make([]byte, 1)); err != nil && err != io.EOF {
		return err
	}
	return nil
}

func functionPath(address, path string) string {
	if path == "" || path[0] != '/' {
		path = "/" + path
	}
	return "http://" + address + path
}
