package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/hearth-serverless/hearth/internal/daemon"
	"github.com/hearth-serverless/hearth/internal/kube/cluster"
	"github.com/hearth-serverless/hearth/internal/stack"
)

// app is one call of hearth.
type app struct {
	args      []string
	lookupEnv func(string) (string, bool)
	in        io.Reader
	out, err  io.Writer

	name  string // what the user calls the program: hearth, or kubectl hearth
	flags *pflag.FlagSet
	said  map[string]bool // flags that choose a deployment and were on the command line
	run   string          // folder of the sockets of a single machine
	kube  cluster.Config

	client *cluster.Client // made when it is first asked for
}

// Main runs hearth in this process and returns its exit code. SIGINT, SIGTERM and SIGHUP end it in good order; a second one at once.
func Main() int {
	ctx, stop := interruptible(context.Background())
	defer stop()
	name, args := called(os.Args)
	a := &app{name: name, args: args, lookupEnv: os.LookupEnv, in: os.Stdin, out: os.Stdout, err: os.Stderr}
	return a.execute(ctx)
}

// pluginName is the program's name in messages of the plugin.
const pluginName = "kubectl hearth"

// called says what the user calls the program, and what its arguments are: kubectl finds its plugin as kubectl-hearth, and the plugin's
// completion as kubectl_complete-hearth.
func called(args []string) (name string, rest []string) {
	switch filepath.Base(args[0]) {
	case "kubectl-hearth":
		return pluginName, args[1:]
	case "kubectl_complete-hearth":
		return pluginName, append([]string{cobra.ShellCompRequestCmd}, args[1:]...)
	}
	return "", args[1:]
}

// isPlugin says whether kubectl has called the program.
func (a *app) isPlugin() bool { return a.name == pluginName }

// named puts the program's name into a text that says hearth.
func (a *app) named(text string) string {
	if !a.isPlugin() {
		return text
	}
	return strings.NewReplacer("`hearth ", "`"+pluginName+" ", "\n  hearth ", "\n  "+pluginName+" ", "  sudo hearth ", "  sudo "+pluginName+" ").Replace("\n" + text)[1:]
}

// interruptible returns a context that the first signal cancels; the second exits.
func interruptible(ctx context.Context) (context.Context, func()) {
	ctx, cancel := context.WithCancel(ctx)
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	done := make(chan struct{})
	go func() {
		select {
		case <-signals:
			cancel()
		case <-done:
			return
		}
		select {
		case <-signals:
			os.Exit(ExitInterrupted)
		case <-done:
		}
	}()
	return ctx, func() {
		signal.Stop(signals)
		close(done)
		cancel()
	}
}

func (a *app) execute(ctx context.Context) int {
	root := a.root()
	root.SetArgs(a.args)
	root.SetIn(a.in)
	root.SetOut(a.out)
	root.SetErr(a.err)
	command, err := root.ExecuteContextC(ctx)
	if err == nil {
		return ExitOK
	}
	_, _ = fmt.Fprintln(a.err, "hearth:", printable(a.named(err.Error())))
	code := exitCode(err)
	if code == ExitUsage {
		_, _ = fmt.Fprintf(a.err, "See %s --help.\n", command.CommandPath())
	}
	return code
}

const rootLong = `Hearth starts serverless functions at once. On one machine it brings its own containerd; no Kubernetes is needed. On Kubernetes
functions are custom resources, and the same commands work.

Which of them is meant: a single machine by --run; a cluster by --kubeconfig, --context or --namespace. Without any of them it is the
single machine that is up on this one, or else the cluster of $KUBECONFIG or ~/.kube/config. "hearth status" says which.

Every flag can also be set in the environment: --tools is HEARTH_TOOLS.

Exit codes: 0 all is well, 1 it failed, 2 wrong flags or arguments, 3 no deployment is there or it does not answer,
4 no such function, or invoke was answered 4xx, 5 invoke was answered 5xx, 130 interrupted.`

const rootExample = `  sudo hearth up --tools .cache/tools/current     bring it up on this machine
  hearth install --registry REGISTRY              or bring it into the cluster of the kubeconfig
  hearth deploy hello --image REF                 deploy a function, from an image or from code
  hearth invoke hello                             call it; it starts when it is called
  hearth start hello --cold --trace               where does the time of a start go?
  sudo hearth down                                leave nothing behind, but the data`

const pluginExample = `  hearth install --registry REGISTRY              bring Hearth into the cluster
  hearth deploy hello --image REF                 deploy a function, from an image or from code
  hearth invoke hello                             call it; it starts when it is called
  hearth uninstall                                leave nothing behind`

func (a *app) root() *cobra.Command {
	root := &cobra.Command{
		Use: "hearth", Short: "Serverless functions that start at once", Long: rootLong, Example: rootExample,
		Version: daemon.Version(), SilenceErrors: true, SilenceUsage: true,
		Args: func(c *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usagef("unknown command %q%s", args[0], suggestions(c, args[0]))
			}
			return nil
		},
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() },
		PersistentPreRunE: func(c *cobra.Command, _ []string) error {
			a.remember()
			if err := daemon.ConfigureFromEnv(c.Flags(), a.lookupEnv); err != nil {
				return usageError{err}
			}
			return a.checkPlace(c)
		},
	}
	a.flags = root.PersistentFlags()
	a.flags.StringVar(&a.run, "run", stack.DefaultRun, "folder of the sockets of a single machine's deployment")
	a.flags.StringVar(&a.kube.Kubeconfig, "kubeconfig", "", "kubeconfig of a cluster (default: $KUBECONFIG, then ~/.kube/config, then the pod's own)")
	a.flags.StringVar(&a.kube.Context, "context", "", "context of the kubeconfig (default: its current one)")
	a.flags.StringVarP(&a.kube.Namespace, "namespace", "n", cluster.DefaultNamespace, "namespace of a cluster's functions")
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	root.AddGroup(&cobra.Group{ID: "deployment", Title: "The deployment"}, &cobra.Group{ID: "functions", Title: "Functions"},
		&cobra.Group{ID: "images", Title: "Images"})
	root.SetHelpCommandGroupID("deployment")
	root.SetCompletionCommandGroupID("deployment")
	for _, c := range []*cobra.Command{a.up(), a.down(), a.install(), a.uninstall(), a.status(), a.doctorCommand(), a.nodeCommands(), a.version()} {
		c.GroupID = "deployment"
		root.AddCommand(c)
	}
	for _, c := range []*cobra.Command{a.deploy(), a.invoke(), a.list(), a.ps(), a.logs(), a.get(), a.start(), a.delete(), a.runtimeCommands(), a.poolCommands()} {
		c.GroupID = "functions"
		root.AddCommand(c)
	}
	images := a.image()
	images.GroupID = "images"
	root.AddCommand(images)
	if a.isPlugin() {
		a.adapt(root)
	}
	return root
}

// adapt has the help of the plugin speak of it, and leaves out what is of a single machine alone.
func (a *app) adapt(root *cobra.Command) {
	root.Use = "kubectl-hearth"
	root.Annotations = map[string]string{cobra.CommandDisplayNameAnnotation: pluginName}
	root.Example = pluginExample
	root.Long = strings.Replace(root.Long, "\"hearth status\"", "\""+pluginName+" status\"", 1)
	for _, c := range all(root) {
		c.Example, c.Long = a.named(c.Example), a.named(c.Long)
		c.Hidden = c.Hidden || c.Annotations[onMachine] != ""
	}
}

func all(c *cobra.Command) []*cobra.Command {
	list := []*cobra.Command{c}
	for _, sub := range c.Commands() {
		list = append(list, all(sub)...)
	}
	return list
}

// checkPlace refuses a command that is of a single machine alone where a cluster is named.
func (a *app) checkPlace(c *cobra.Command) error {
	why, ok := c.Annotations[onMachine]
	if !ok {
		return nil
	}
	if _, onCluster, err := a.wants(); err != nil || !onCluster && !a.isPlugin() {
		return err
	}
	return usagef("%s is of a single machine: %s", c.CommandPath(), why)
}

func suggestions(c *cobra.Command, word string) string {
	c.SuggestionsMinimumDistance = 2
	if near := c.SuggestionsFor(word); len(near) > 0 {
		return "; did you mean " + strings.Join(near, " or ") + "?"
	}
	return ""
}

// takes checks the number of arguments.
func takes(least, most int, what string) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		if len(args) < least || len(args) > most {
			if what == "" {
				return usagef("takes no arguments, and got %q", args)
			}
			return usagef("wants %s, and got %d arguments", what, len(args))
		}
		return nil
	}
}

func (a *app) version() *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Print the version", Args: takes(0, 0, ""),
		RunE: func(*cobra.Command, []string) error { return a.println(daemon.Version()) },
	}
}

func (a *app) println(words ...any) error {
	_, err := fmt.Fprintln(a.out, words...)
	return err
}

func (a *app) printf(format string, args ...any) error {
	_, err := fmt.Fprintf(a.out, format, args...)
	return err
}

// note tells the user something that is not the result.
func (a *app) note(format string, args ...any) { _, _ = fmt.Fprintf(a.err, format+"\n", args...) }

// interrupted is the error of a command that the user ended.
func interrupted(ctx context.Context, err error) error {
	if ctx.Err() != nil && err != nil {
		return errors.Join(context.Canceled, err)
	}
	return err
}
