package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/hearth-serverless/hearth/internal/daemon"
	"github.com/hearth-serverless/hearth/internal/kube/cluster"
	"github.com/hearth-serverless/hearth/internal/release"
)

// installOptions are the flags of install.
type installOptions struct {
	registry, tag, programs string
	push                    bool
	dryRun, restart         string
	within                  time.Duration
	access                  registryOptions
}

const installLong = `Brings Hearth into a cluster, or brings what is there to this version: namespaces hearth-system and hearth, the kinds Function, Revision,
Runtime and WarmPool, the rights, the daemons. It returns when all daemons are ready. It may be repeated. You need to be the cluster's
administrator.

The daemons' images are REGISTRY/hearth/{nodeagent,poolmanager,gateway,pause}:TAG. With --push they are made first of the programs that stand
beside hearth, and pushed there; then the cluster is given their digests. REGISTRY is also where functions' code will be pushed to.

On each node nodeagent registers itself with containerd, which is restarted for that once; what runs on the node stays as it is.`

const installExample = `  hearth install --registry registry.example/team --push
  hearth install --registry registry.example/team --tag v1.2.0 --context production
  hearth install --registry registry.example/team --dry-run=print >hearth.yaml`

func (a *app) install() *cobra.Command {
	o := &installOptions{}
	c := &cobra.Command{
		Use: "install --registry REGISTRY", Short: "Bring Hearth into a cluster, or up to this version", Long: installLong, Example: installExample, Args: takes(0, 0, ""),
		RunE: func(c *cobra.Command, _ []string) error {
			if err := a.wantsCluster(); err != nil {
				return err
			}
			if err := o.validate(); err != nil {
				return err
			}
			return a.runInstall(c.Context(), o)
		},
	}
	f := c.Flags()
	f.StringVar(&o.registry, "registry", "", "HOST[:PORT][/PATH] of the daemons' images and of functions' code, as nodes reach it (required)")
	f.StringVar(&o.tag, "tag", daemon.Version(), "of the images")
	f.BoolVar(&o.push, "push", false, "make the images of the programs in --programs, and push them to --registry")
	f.StringVar(&o.programs, "programs", "", "folder of nodeagent, poolmanager and the others, with --push (default: that of hearth itself)")
	f.StringVar(&o.dryRun, "dry-run", "", "print: write what would be applied as YAML, and apply nothing")
	f.DurationVar(&o.within, "timeout", 5*time.Minute, "give up waiting for the daemons after this time; they go on to start")
	f.StringVar(&o.restart, "restart-command", "", "how a node's containerd is restarted where systemd does not keep it: `sh -c`, with CONTAINERD_PID in its environment")
	o.access.add(f)
	_ = c.RegisterFlagCompletionFunc("dry-run", cobra.FixedCompletions([]string{"print"}, cobra.ShellCompDirectiveNoFileComp))
	return c
}

// wantsCluster refuses what names a single machine, and a namespace that the manifests do not have.
func (a *app) wantsCluster() error {
	machine, _, err := a.wants()
	switch {
	case err != nil:
		return err
	case machine:
		return usagef("this is about a cluster, and --run names a single machine")
	case a.kube.Namespace != cluster.DefaultNamespace:
		return usagef("--namespace %s: Hearth is installed with namespace %s; another one wants an overlay of deploy/base", a.kube.Namespace, cluster.DefaultNamespace)
	}
	return nil
}

func (o *installOptions) validate() error {
	switch {
	case o.registry == "":
		return usagef("--registry is missing: which registry has the daemons' images, or will have them with --push?")
	case o.dryRun != "" && o.dryRun != "print":
		return usagef("--dry-run %q: use print", o.dryRun)
	case o.dryRun != "" && o.push:
		return usagef("--push and --dry-run: the one does something, the other nothing")
	case o.programs != "" && !o.push:
		return usagef("--programs is about --push")
	}
	return checkRegistry(o.registry)
}

func (a *app) runInstall(ctx context.Context, o *installOptions) error {
	images, err := a.releaseImages(ctx, o)
	if err != nil {
		return err
	}
	in := cluster.Installation{Images: images, Registry: o.registry, RestartCommand: o.restart}
	if o.dryRun != "" {
		text, err := in.YAML()
		if err != nil {
			return err
		}
		return a.printf("%s", text)
	}
	c, err := a.cluster()
	if err != nil {
		return err
	}
	clock := stopwatch(time.Now())
	a.note("Bringing Hearth into the cluster of context %s at %s", c.Context(), c.Server())
	if err := c.Install(ctx, in, o.within, func(text string) { a.note("%s  %s", clock(), printable(text)) }); err != nil {
		return interrupted(ctx, a.explain(err, "install"))
	}
	return a.printf("%s", a.named(`Hearth is in the cluster.
Next: `+"`hearth pool apply sandboxes --size 3`, `hearth deploy NAME --image REF`, then `hearth invoke NAME`"+`
Code wants a runtime: `+"`hearth runtime apply NAME --image REF --warm 2`, then `hearth deploy NAME DIR`"+`
See `+"`hearth status` and `hearth doctor`; the end of it: `hearth uninstall`"+`
`))
}

// releaseImages are the references of the daemons' images by their names, pushed if that is wanted.
func (a *app) releaseImages(ctx context.Context, o *installOptions) (map[string]string, error) {
	if !o.push {
		images := map[string]string{}
		for _, name := range release.Names() {
			images[name] = strings.TrimSuffix(o.registry, "/") + "/" + name + ":" + o.tag
		}
		return images, nil
	}
	if o.programs == "" {
		self, err := os.Executable()
		if err == nil {
			self, err = filepath.EvalSymlinks(self)
		}
		if err != nil {
			return nil, fmt.Errorf("find the programs beside hearth: %w; name their folder by --programs", err)
		}
		o.programs = filepath.Dir(self)
	}
	built, err := release.Build(ctx, o.programs)
	if err != nil {
		return nil, interrupted(ctx, fmt.Errorf("make the images of %s: %w", o.programs, err))
	}
	defer built.Close()
	client, err := o.access.client()
	if err != nil {
		return nil, err
	}
	defer client.Close()
	var images map[string]string
	err = a.patiently(ctx, "pushing the daemons' images to "+o.registry, true, func(ctx context.Context) (err error) {
		images, err = built.Push(ctx, client, o.registry, o.tag)
		return err
	})
	if err != nil {
		return nil, explainPush(ctx, err, o.registry)
	}
	return images, nil
}

const uninstallLong = `Takes Hearth out of a cluster: ends all functions, runtimes and pools, gives each node's containerd its configuration back as it was before,
and removes the daemons, their rights, and the namespaces hearth-system and hearth with all that is in them. --all removes Hearth's kinds
as well. It may be repeated, and goes on where it was broken off.

A node that cannot be given back, for it does not answer, is waited for; --force goes on without it, and it stays as it is.`

func (a *app) uninstall() *cobra.Command {
	r := cluster.Removal{}
	c := &cobra.Command{
		Use: "uninstall", Short: "Take Hearth out of a cluster and leave nothing", Long: uninstallLong, Args: takes(0, 0, ""),
		Example: "  hearth uninstall\n  hearth uninstall --all --context test",
		RunE: func(c *cobra.Command, _ []string) error {
			if err := a.wantsCluster(); err != nil {
				return err
			}
			client, err := a.cluster()
			if err != nil {
				return err
			}
			clock := stopwatch(time.Now())
			a.note("Taking Hearth out of the cluster of context %s at %s", client.Context(), client.Server())
			err = client.Uninstall(c.Context(), r, func(text string) { a.note("%s  %s", clock(), printable(text)) })
			if err != nil {
				err = a.explain(err, "uninstall")
				return interrupted(c.Context(), errors.Join(err, errors.New("what is left goes with another `hearth uninstall`")))
			}
			a.note("Hearth is gone from the cluster.")
			return nil
		},
	}
	c.Flags().BoolVar(&r.Kinds, "all", false, "remove the kinds Function, Revision, Runtime and WarmPool too, of all namespaces")
	c.Flags().BoolVar(&r.Force, "force", false, "go on when a node cannot be given back")
	c.Flags().DurationVar(&r.Within, "timeout", 2*time.Minute, "for each of the things that are waited for")
	return c
}
