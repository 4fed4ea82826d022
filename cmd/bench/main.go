// Command bench measures Hearth side by side with its peers, builds the images that this takes, and shows the demo.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/hearth-serverless/hearth/bench"
	"github.com/hearth-serverless/hearth/bench/disk"
	"github.com/hearth-serverless/hearth/bench/images"
	"github.com/hearth-serverless/hearth/internal/daemon"
	"github.com/hearth-serverless/hearth/test/cluster"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := command().ExecuteContext(ctx); err != nil {
		if ctx.Err() != nil {
			err = errors.Join(errors.New("interrupted; everything that ran was ended"), err)
		}
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func command() *cobra.Command {
	self, err := os.Executable()
	if err != nil {
		self = os.Args[0]
	}
	bin := filepath.Dir(self)
	cache := os.Getenv("HEARTH_CACHE")
	if cache == "" {
		cache = filepath.Join(filepath.Dir(bin), ".cache")
	}
	o := bench.Options{Progress: os.Stderr, Cluster: cluster.Temporary}
	root := &cobra.Command{
		Use:   "bench SUITE",
		Short: "Measure Hearth side by side with its peers",
		Long: `Measures Hearth side by side with its peers, in one run on this machine, with interleaved rounds.
A table goes to standard output, progress to standard error, and with --json every sample to a file.

Suites:
  start        from a request at the gateway to the first byte: cold, from the pool, warm; beside the bare process
  handoff      from a request to the last byte, in cases RUNTIME/DEGREE/N of N starts at once from a sandbox, a booted
               runtime or a frozen revision; beside plain pods of containerd's own CRI
  pull         what a pull takes, in cases IMAGE/ENCODING/LINK; beside containerd's defaults and others
  pull-faults  whether a pull ends as it should when the registry, the disk or a daemon fails
  prefetch     from a request to its answer with nothing of the image in memory, in cases IMAGE/DISK; beside the same
               without prefetch, and with the whole image read ahead
  k8s-start    on a cluster, from a request for a function at zero to the last byte, in cases RUNTIME/DEGREE[/N]; beside
               a Deployment that is scaled to one ($KUBECONFIG; without it a cluster is made for it)
  demo         a short start suite, with the waterfall of one cold start`,
		Example: `  bench start --quick
  bench handoff --cases python/runtime/1,python/revision/50
  bench pull --images python,go --rounds 5 --json pull.json
  bench pull --images fat --encodings gzip,zstd --links gigabit,capped --systems hearth,soci
  bench pull --image docker.io/library/postgres:17
  bench k8s-start --cases python/runtime,native/runtime/20
  bench images python`,
		Version:       daemon.Version(),
		ValidArgs:     bench.Names(),
		Args:          cobra.ExactArgs(1),
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	flags := root.PersistentFlags()
	flags.StringVar(&o.Cache, "cache", cache, "folder of images and tools")
	flags.StringVar(&o.Tools, "tools", filepath.Join(cache, "tools", "current"), "folder of containerd, runc, registry and others (see `make tools`)")
	flags.StringVar(&o.Bin, "bin", bin, "folder of nodeagent, poolmanager and gateway")
	root.Flags().BoolVar(&o.Quick, "quick", false, "fewer rounds: ends within two minutes")
	root.Flags().IntVar(&o.Rounds, "rounds", 0, "rounds over all cases and systems; 0 is the suite's own number")
	list := func(to *[]string, name, what string, all []string) {
		root.Flags().StringSliceVar(to, name, nil, what+": "+strings.Join(all, ", "))
	}
	list(&o.Images, "images", "images that are pulled", bench.SampleImages())
	list(&o.Encodings, "encodings", "how their layers are encoded", bench.Encodings())
	list(&o.Links, "links", "over which they come", bench.Links())
	list(&o.Systems, "systems", "which are compared", bench.Systems())
	list(&o.Faults, "faults", "faults that pull-faults brings about", bench.Faults())
	list(&o.Cases, "cases", "cases of handoff and k8s-start", []string{"RUNTIME/DEGREE/N, like python/runtime/1, java/revision/10, image/sandbox/50; of prefetch: IMAGE/DISK, like java/limited"})
	root.Flags().StringVar(&o.Image, "image", "", "an image of any registry, pulled beside --images or alone")
	root.Flags().StringVar(&o.Gateway, "gateway", "", "URL of a cluster's gateway (default: one that is found by its pods)")
	root.Flags().StringVar(&o.Registry, "registry", "", "HOST[:PORT] of a registry that a cluster's nodes pull from")
	root.Flags().StringVar(&o.Function, "function", "", "image that start and demo deploy (default python), and handoff (default go)")
	json := root.Flags().String("json", "", "file for the rows and all samples")
	root.RunE = func(cmd *cobra.Command, args []string) error { return runSuite(cmd, args[0], o, *json) }
	root.AddCommand(imagesCommand(&o), &cobra.Command{Use: bench.ServeDisk, Hidden: true, Args: cobra.ExactArgs(1), RunE: func(_ *cobra.Command, args []string) error {
		return disk.Serve(args[0], os.Stdin, os.Stdout)
	}})
	return root
}

// runSuite prints what was measured also when the suite ended early.
func runSuite(cmd *cobra.Command, suite string, o bench.Options, json string) error {
	report, err := bench.Run(cmd.Context(), suite, o)
	if report == nil || len(report.Rows) == 0 {
		return err
	}
	fmt.Fprintln(cmd.OutOrStdout())
	return errors.Join(err, report.WriteTable(cmd.OutOrStdout()), report.WriteFile(json))
}

func imagesCommand(o *bench.Options) *cobra.Command {
	archives, registry := "", ""
	cmd := &cobra.Command{
		Use:       "images [NAME...]",
		Short:     "Build the sample images, all or those named, unless they are cached",
		ValidArgs: images.Names(),
		Args:      cobra.OnlyValidArgs,
		RunE: func(cmd *cobra.Command, names []string) error {
			if len(names) == 0 {
				names = images.Names()
			}
			for _, name := range names {
				path, err := images.Build(cmd.Context(), images.Config{
					Cache:    o.Cache,
					Progress: func(line string) { fmt.Fprintln(cmd.ErrOrStderr(), "images:", line) },
				}, name)
				if err != nil {
					return err
				}
				fmt.Fprintln(cmd.OutOrStdout(), path)
				if archives != "" {
					err = images.ExportFile(path, "hearth.local/"+name+":1", filepath.Join(archives, name+".tar"))
				}
				if err == nil && registry != "" {
					_, err = images.Push(cmd.Context(), path, registry+"/"+name+":1")
				}
				if err != nil {
					return err
				}
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&archives, "archives", "", "folder in which to write NAME.tar too, for `ctr images import`, as hearth.local/NAME:1")
	cmd.Flags().StringVar(&registry, "push", "", "HOST[:PORT] of a registry to which to push them too, as HOST[:PORT]/NAME:1")
	return cmd
}
