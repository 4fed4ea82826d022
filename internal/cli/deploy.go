package cli

import (
	"context"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"google.golang.org/protobuf/types/known/durationpb"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/internal/stack"
)

// deployOptions are the flags of deploy; hearthv1.FunctionSpec explains them.
type deployOptions struct {
	image                                 string
	port, concurrency, least, most, queue int32
	env, command, hosts                   []string
	window, grace, timeout                time.Duration
	memory, cpu                           string
	wait                                  bool
	out                                   format
}

const deployLong = `Creates a function, or changes it. The image's process has to listen on $PORT. What follows -- replaces the image's arguments.
Unless --wait=false, the command returns when the image is on the node, so that the first call does not wait for it.`

const deployExample = `  hearth deploy hello --image 127.0.0.1:5000/hello:1
  hearth deploy hello --image REF --port 3000 --env GREETING=hi --concurrency 1 --max 50
  hearth deploy hello --image REF --min 1 --memory 512Mi --cpu 0.5 -- serve --fast`

func (a *app) deploy() *cobra.Command {
	o := &deployOptions{}
	c := &cobra.Command{
		Use: "deploy NAME --image REF [flags] [-- ARG...]", Short: "Create or change a function", Long: deployLong, Example: deployExample,
		Args: func(c *cobra.Command, args []string) error {
			if n := c.ArgsLenAtDash(); n >= 0 {
				args = args[:n]
			}
			return takes(1, 1, "the function's NAME (arguments for its process come after --)")(c, args)
		},
		RunE: func(c *cobra.Command, args []string) error {
			spec, err := o.spec(args[1:])
			if err != nil {
				return err
			}
			return a.runDeploy(c.Context(), &hearthv1.Function{Name: args[0], Spec: spec}, o)
		},
	}
	o.add(c.Flags())
	return c
}

func (o *deployOptions) add(f *pflag.FlagSet) {
	f.StringVar(&o.image, "image", "", "image reference (required)")
	f.Int32Var(&o.port, "port", 0, "where the process listens, given to it as $PORT (default 8080)")
	f.StringArrayVarP(&o.env, "env", "e", nil, "KEY=VALUE for the process; may be repeated")
	f.Int32Var(&o.concurrency, "concurrency", 0, "requests that an instance serves at once (default 10)")
	f.Int32Var(&o.least, "min", 0, "instances that are always ready")
	f.Int32Var(&o.most, "max", 0, "instances at most (default 10)")
	f.Int32Var(&o.queue, "queue", 0, "requests that may wait for an instance (default 1000)")
	f.DurationVar(&o.window, "window", 0, "over which concurrency is averaged (default 1m)")
	f.DurationVar(&o.grace, "grace", 0, "how long the last instance stays when nobody calls (default 30s)")
	f.DurationVar(&o.timeout, "timeout", 0, "longest time to the first byte of an answer (default 1m)")
	f.StringArrayVar(&o.hosts, "host", nil, "further host name that leads to the function; may be repeated")
	f.StringArrayVar(&o.command, "command", nil, "program to run instead of the image's entrypoint; repeat for its words")
	f.StringVar(&o.memory, "memory", "", "limit of an instance, like 512Mi (default none)")
	f.StringVar(&o.cpu, "cpu", "", "limit of an instance in cores, like 0.5 (default none)")
	f.BoolVar(&o.wait, "wait", true, "wait until the image is on the node")
	o.out.add(f)
}

func (o *deployOptions) spec(args []string) (*hearthv1.FunctionSpec, error) {
	if o.image == "" {
		return nil, usagef("--image is missing: which image should the function run?")
	}
	env := map[string]string{}
	for _, pair := range o.env {
		key, value, ok := strings.Cut(pair, "=")
		if !ok || key == "" {
			return nil, usagef("--env %q: want KEY=VALUE", pair)
		}
		env[key] = value
	}
	memory, err := parseBytes(o.memory)
	if err != nil {
		return nil, usagef("--memory %q: %w", o.memory, err)
	}
	cpu, err := parseCores(o.cpu)
	if err != nil {
		return nil, usagef("--cpu %q: %w", o.cpu, err)
	}
	return &hearthv1.FunctionSpec{
		Image: o.image, Port: o.port, Env: env, Command: o.command, Args: args, Hosts: o.hosts,
		Timeout: duration(o.timeout), Resources: &hearthv1.Resources{MemoryBytes: memory, CpuMillis: cpu},
		Scaling: &hearthv1.Scaling{
			Concurrency: o.concurrency, Min: o.least, Max: o.most, Queue: o.queue, Window: duration(o.window), Grace: duration(o.grace),
		},
	}, nil
}

func duration(d time.Duration) *durationpb.Duration {
	if d == 0 {
		return nil
	}
	return durationpb.New(d)
}

func (a *app) runDeploy(ctx context.Context, f *hearthv1.Function, o *deployOptions) error {
	start := time.Now()
	var resp *connect.Response[hearthv1.ApplyResponse]
	err := a.patiently(ctx, "preparing "+f.GetSpec().GetImage(), o.wait, func(ctx context.Context) (err error) {
		resp, err = a.functions().Apply(ctx, connect.NewRequest(&hearthv1.ApplyRequest{Function: f, Prepare: o.wait}))
		return err
	})
	if err != nil {
		return explain(err, "deploy "+f.GetName(), a.run)
	}
	if o.out == formatJSON {
		return a.printJSON(message(resp.Msg.GetFunction()))
	}
	a.note("%s is deployed as %s (%.1f s)", f.GetName(), resp.Msg.GetFunction().GetStatus().GetRevision(), time.Since(start).Seconds())
	s, err := stack.ReadStatus(a.run)
	if err != nil {
		return err
	}
	return a.println(functionURL(s.Gateway, f.GetName(), ""))
}

// progressPause is how often a long wait says that it still waits.
const progressPause = 5 * time.Second

// patiently does something that may take long, and says so from time to time.
func (a *app) patiently(ctx context.Context, what string, tell bool, do func(context.Context) error) error {
	ended := make(chan error, 1)
	go func() { ended <- do(ctx) }()
	tick := time.NewTicker(progressPause)
	defer tick.Stop()
	clock := stopwatch(time.Now())
	if tell {
		a.note("%s", what)
	}
	for {
		select {
		case err := <-ended:
			return err
		case <-tick.C:
			if tell {
				a.note("%s  still %s", clock(), what)
			}
		}
	}
}

// parseBytes reads a size with a unit of 1024 (Ki, Mi, Gi) or 1000 (k, M, G) or none.
func parseBytes(s string) (int64, error) {
	if s == "" {
		return 0, nil
	}
	factor := int64(1)
	for _, u := range []struct {
		suffix string
		factor int64
	}{{"Ki", 1 << 10}, {"Mi", 1 << 20}, {"Gi", 1 << 30}, {"k", 1e3}, {"M", 1e6}, {"G", 1e9}} {
		if number, ok := strings.CutSuffix(s, u.suffix); ok {
			s, factor = number, u.factor
			break
		}
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n <= 0 || n > math.MaxInt64/factor {
		return 0, fmt.Errorf("want a size like 512Mi or 2G")
	}
	return n * factor, nil
}

// parseCores reads 0.5 or 500m as thousandths of a core.
func parseCores(s string) (int64, error) {
	if s == "" {
		return 0, nil
	}
	errCores := fmt.Errorf("want a number of cores like 0.5 or 500m")
	if number, ok := strings.CutSuffix(s, "m"); ok {
		n, err := strconv.ParseInt(number, 10, 32)
		if err != nil || n <= 0 {
			return 0, errCores
		}
		return n, nil
	}
	f, err := strconv.ParseFloat(s, 64)
	if err != nil || !(f >= 0.001 && f <= 1e6) {
		return 0, errCores
	}
	return int64(math.Round(f * 1000)), nil
}
