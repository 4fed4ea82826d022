package cli

import (
	"context"
	"fmt"
	"io"
	"math"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"google.golang.org/protobuf/types/known/durationpb"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

// deployOptions are the flags of deploy; hearthv1.FunctionSpec explains them.
type deployOptions struct {
	image                                         string
	code                                          codeOptions
	port, concurrency, least, most, queue, frozen int32
	env, secrets, command, hosts                  []string
	window, timeout                               time.Duration
	grace                                         *durationpb.Duration // nil for the default: none at all is 0
	memory, cpu, tenant, group                    string
	writableRoot                                  bool
	wait                                          bool
	out                                           format
}

const deployLong = `Creates a function, or changes it, from code or from an image. Unless --wait=false, the command returns when what it runs is on
the nodes, so that the first call does not wait for that.

Code is a folder or a file; a runtime loads it (see "hearth runtime"), guessed from what is there if --runtime does not name it. What
.hearthignore names is left out (its language is .gitignore's), and so are .git, __pycache__ and node_modules/.cache. What a
requirements.txt names is installed with pip, and what a package-lock.json names with npm unless node_modules is there; they
have to be those of the runtime's version. The same code gives the same package, which is pushed only if the registry lacks it.

An image's process has to listen on $PORT. What follows -- replaces the image's arguments.

Functions that are called seldom may share a pod, by --merge GROUP: one network and one sandbox for several of them, which saves
memory and, for all but the first, the sandbox's start. They trust each other: what one listens on the others can reach, and may take.`

const deployExample = `  hearth deploy hello ./hello                     a folder with main.py and its function main, or package.json, or a jar…
  hearth deploy hello hello.py --handler hello.greet --env GREETING=hi
  hearth deploy orders ./orders --runtime node --handler index.handle --signature cloudevent --secret token=@token.txt
  hearth deploy fast ./server --runtime native     a program that listens on $PORT
  hearth deploy hello --image 127.0.0.1:5000/hello:1
  hearth deploy rare ./rare --tenant acme --merge seldom --memory 128Mi
  hearth deploy hello --image REF --min 1 --memory 512Mi --cpu 0.5 --concurrency 1 -- serve --fast`

func (a *app) deploy() *cobra.Command {
	o := &deployOptions{}
	c := &cobra.Command{
		Use: "deploy NAME {DIR|FILE | --image REF} [flags] [-- ARG...]", Short: "Create or change a function", Long: deployLong, Example: deployExample,
		Args: func(c *cobra.Command, args []string) error {
			words, _ := splitAtDash(c, args)
			return takes(1, 2, "the function's NAME, and a folder or file of code or --image (arguments for an image's process come after --)")(c, words)
		},
		ValidArgsFunction: func(c *cobra.Command, args []string, word string) ([]string, cobra.ShellCompDirective) {
			if len(args) == 1 {
				return nil, cobra.ShellCompDirectiveDefault // files
			}
			return a.completeFunction(c, args, word)
		},
		RunE: func(c *cobra.Command, args []string) error {
			words, rest := splitAtDash(c, args)
			if err := o.validate(words[1:], rest); err != nil {
				return err
			}
			spec, err := o.spec(rest)
			if err != nil {
				return err
			}
			if len(words) > 1 {
				if spec.Runtime, spec.Code, err = a.deployCode(c.Context(), words[0], words[1], &o.code); err != nil {
					return err
				}
			}
			return a.runDeploy(c.Context(), &hearthv1.Function{Name: words[0], Spec: spec}, o)
		},
	}
	o.add(c.Flags())
	o.code.complete(a, c)
	return c
}

// splitAtDash separates the command's arguments from those behind --.
func splitAtDash(c *cobra.Command, args []string) (words, rest []string) {
	if n := c.ArgsLenAtDash(); n >= 0 {
		return args[:n], args[n:]
	}
	return args, nil
}

// validate checks that there is something to run, one thing, and that the flags are about that.
func (o *deployOptions) validate(code, args []string) error {
	switch given := o.code.given(); {
	case o.image == "" && len(code) == 0:
		return usagef("what should the function run? Name a folder or file of code, or an image by --image")
	case o.image != "" && len(code) > 0:
		return usagef("--image %s and %q: a function runs one of them (arguments for the image's process come after --)", o.image, code[0])
	case o.image != "" && len(given) > 0:
		return usagef("%s: for code only, and --image names an image", strings.Join(given, ", "))
	case o.image == "" && o.writableRoot:
		return usagef("--writable-root is an image's; code writes to /tmp")
	case o.image == "" && (len(args) > 0 || len(o.command) > 0):
		return usagef("--command and arguments are an image's; what answers in code is named by --handler")
	}
	return o.code.validate()
}

func (o *deployOptions) add(f *pflag.FlagSet) {
	f.StringVar(&o.image, "image", "", "image reference, in place of code")
	o.code.add(f)
	f.Int32Var(&o.port, "port", 0, "where the process listens, given to it as $PORT (default 8080)")
	f.StringArrayVarP(&o.env, "env", "e", nil, "KEY=VALUE for the process; may be repeated")
	f.StringArrayVar(&o.secrets, "secret", nil, "NAME=@FILE, or NAME=VALUE which others on this machine can see: a file in /run/secrets, in memory only; may be repeated")
	f.Int32Var(&o.concurrency, "concurrency", 0, "requests that an instance serves at once (default 10)")
	f.Int32Var(&o.least, "min", 0, "instances that are always ready")
	f.Int32Var(&o.most, "max", 0, "instances at most (default 10)")
	f.Int32Var(&o.queue, "queue", 0, "requests that may wait for an instance (default 1000)")
	f.Int32Var(&o.frozen, "frozen", 0, "instances that are kept frozen when nobody needs them; negative for none (default 1)")
	f.DurationVar(&o.window, "window", 0, "over which concurrency is averaged (default 1m)")
	f.Func("grace", "`duration` that the last instance stays when nobody calls; 0s for none (default 30s)", func(text string) error {
		d, err := time.ParseDuration(text)
		o.grace = durationpb.New(d)
		return err
	})
	f.DurationVar(&o.timeout, "timeout", 0, "longest time to the first byte of an answer (default 1m)")
	f.StringArrayVar(&o.hosts, "host", nil, "further host name that leads to the function; may be repeated")
	f.StringArrayVar(&o.command, "command", nil, "program to run instead of the image's entrypoint; repeat for its words")
	f.StringVar(&o.memory, "memory", "", "limit of an instance, like 512Mi (default: that of the node, 1Gi unless it was set up otherwise)")
	f.StringVar(&o.cpu, "cpu", "", "limit of an instance in cores, like 0.5 (default none)")
	f.StringVar(&o.tenant, "tenant", "", "whose function it is; those of different tenants never share a pod")
	f.StringVar(&o.group, "merge", "", "share pods with the functions of this group and the same tenant, each with limits, log and port of its own")
	f.BoolVar(&o.writableRoot, "writable-root", false, "let the image's process write to its root file system, in memory, up to half of its limit (default: to /tmp and /var/tmp only)")
	f.BoolVar(&o.wait, "wait", true, "wait until what it runs is on the nodes")
	o.out.add(f)
}

func (o *deployOptions) spec(args []string) (*hearthv1.FunctionSpec, error) {
	env, err := pairs("--env", o.env)
	if err != nil {
		return nil, err
	}
	secrets, err := readSecrets(o.secrets)
	if err != nil {
		return nil, err
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
		Image: o.image, WritableRoot: o.writableRoot, Tenant: o.tenant, Group: o.group, Port: o.port, Env: env, Secrets: secrets, Command: o.command, Args: args, Hosts: o.hosts,
		Timeout: duration(o.timeout), Resources: &hearthv1.Resources{MemoryBytes: memory, CpuMillis: cpu},
		Scaling: &hearthv1.Scaling{
			Concurrency: o.concurrency, Min: o.least, Max: o.most, Queue: o.queue, Window: duration(o.window), Grace: o.grace,
			Frozen: o.frozen,
		},
	}, nil
}

// pairs reads the values of a flag that takes KEY=VALUE.
func pairs(flag string, values []string) (map[string]string, error) {
	m := map[string]string{}
	for _, pair := range values {
		key, value, ok := strings.Cut(pair, "=")
		if !ok || key == "" {
			return nil, usagef("%s %q: want KEY=VALUE", flag, pair)
		}
		m[key] = value
	}
	return m, nil
}

// maxSecretBytes is more than poolmanager takes, which says how much that is.
const maxSecretBytes = 1 << 20

// readSecrets reads the values of --secret. Errors never show a value.
func readSecrets(values []string) (map[string][]byte, error) {
	if len(values) == 0 {
		return nil, nil
	}
	secrets := map[string][]byte{}
	for i, pair := range values {
		name, value, ok := strings.Cut(pair, "=")
		if !ok || name == "" || strings.ContainsAny(name, "/\x00") || name == "." || name == ".." {
			return nil, usagef("--secret, the one at place %d: want NAME=@FILE or NAME=VALUE, with the name of a file", i+1)
		}
		secrets[name] = []byte(value)
		if file, ok := strings.CutPrefix(value, "@"); ok {
			data, err := readSecret(file)
			if err != nil {
				return nil, fmt.Errorf("--secret %s: %w", name, err)
			}
			secrets[name] = data
		}
	}
	return secrets, nil
}

func readSecret(file string) ([]byte, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxSecretBytes+1))
	if err == nil && len(data) > maxSecretBytes {
		err = fmt.Errorf("%s has more than %d bytes", file, maxSecretBytes)
	}
	return data, err
}

func duration(d time.Duration) *durationpb.Duration {
	if d == 0 {
		return nil
	}
	return durationpb.New(d)
}

func (a *app) runDeploy(ctx context.Context, f *hearthv1.Function, o *deployOptions) error {
	start := time.Now()
	d, err := a.deployment()
	if err != nil {
		return err
	}
	var applied *hearthv1.Function
	err = a.patiently(ctx, "preparing "+runs(f.GetSpec()), o.wait, func(ctx context.Context) (err error) {
		applied, err = d.ApplyFunction(ctx, f, o.wait, a.tell)
		return err
	})
	if err != nil {
		return a.explain(err, "deploy "+f.GetName())
	}
	if o.out == formatJSON {
		return a.printJSON(message(applied))
	}
	if revision := applied.GetStatus().GetRevision(); revision != "" {
		a.note("%s is deployed as %s (%.1f s)", f.GetName(), revision, time.Since(start).Seconds())
	} else {
		a.note("%s is applied", f.GetName())
	}
	gateway, err := d.GatewayURL(ctx)
	if err != nil {
		return a.explain(err, "find the gateway")
	}
	return a.println(functionURL(gateway, f.GetName(), ""))
}

// tell says what is waited for.
func (a *app) tell(what string) { a.note("%s", printable(what)) }

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
